"""Imported once by the server that forks the ranks of tests, so that a rank starts without importing again."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import torch  # noqa: F401
import transformers.models.bert.modeling_bert  # noqa: F401

import bigdssm.training.stages  # noqa: F401
