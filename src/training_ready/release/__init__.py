"""Release: is it fit to leave, and did it arrive?

From a trained model to a folder of safetensors with an honest card (:mod:`.export`, :mod:`.card`, :mod:`.record`);
from that folder to a hub, a bucket or a folder with every byte read back (:mod:`.contents`, :mod:`.publish`); and a
hub of our own for laptops, tests and machines without the internet (:mod:`.hub_server`, :mod:`.hub_store`).
"""
