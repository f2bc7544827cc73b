"""Fine-tuning (SFT): deepspeed launch/sft.py --config configs/movielens_100k.yaml [key=value …]."""

import sys

from bigdssm.training.command import main

if __name__ == "__main__":
    sys.exit(main("sft"))
