"""Does it answer? A released model behind TGI's HTTP API and OpenAI's, on loopback unless told otherwise.

A request travels: ``schemas`` (shape) → ``admission`` (values, and the context arithmetic) → ``engine`` (queue and
worker) → ``decoding`` (next token) → ``text`` (what may leave) → ``tgi_api`` or ``openai_api`` (dialect). Nothing is
imported here, so that the front door stays quick.
"""
