"""Supervised fine-tuning of dense and Mixture-of-Experts models from a recipe.

accelerate launch scripts/run_sft.py recipes/moe.yaml
accelerate launch --config_file accelerate_configs/cpu.yaml scripts/run_sft.py recipes/quickstart.yaml max_steps=20
"""

import sys

from training_ready.check.start import check_before_start
from training_ready.training.main import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], check=check_before_start))
