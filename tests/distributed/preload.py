"""Imported once by the server that forks the ranks of tests, so that a rank starts without importing again."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch  # noqa: F401
import transformers.models.bert.modeling_bert  # noqa: F401

import bigdssm.training.stages  # noqa: F401

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else tests with an engine of their own compile it
