"""What is this run? One YAML, one run: schema, ``extends:``, overrides, origins, migration of older recipes.

``training_ready.recipe.load.load_recipe`` reads a recipe and reports every fault at once. Nothing in this room
imports torch, trl or transformers, except ``generate_schema``, which is run by hand after an upgrade of TRL.
"""
