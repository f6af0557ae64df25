"""May it start? One file per probe, each of which says what it measured; :mod:`training_ready.check.run` runs them all.

A probe is a function ``probe_<name>(context: CheckContext) -> list[Finding]``. It loads no model weight. What several
probes need (bucket, records, tokenizer, configuration, model on the meta device) is made once by ``context.py``.
"""
