"""What do we train on, and may we?

Rows of raw sources in a bucket become typed records, pass gates that keep or reject them with a reason, get a
split, and are written as Parquet shards under one manifest. The files in the order of that way: ``spec``, ``inputs``,
``readers`` (bytes to rows), ``adapters`` (rows to turns), ``candidates`` (turns and facts, before the gates),
``gates``, ``split``, ``shards``, ``assemble``, ``build``; other rooms import ``record`` and ``manifest``.
"""
