"""Which tokens come next? Corpus shards → rows → chat template → tokens → packs, in an order that resumes exactly."""
