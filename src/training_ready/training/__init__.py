"""How do the weights move? Supervised fine-tuning of dense and Mixture-of-Experts models over TRL."""
