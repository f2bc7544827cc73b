"""Everything that a rank or a command line of the tests imports: the fork server imports it once for all of them."""

import gc
import os

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import deepspeed.module_inject
import pandas  # noqa: F401
import torch  # noqa: F401
import transformers.models.bert.modeling_bert  # noqa: F401

import bigdssm.commands._stage
import bigdssm.models.encoders.transformer
import bigdssm.training.stages  # noqa: F401

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else tests with an engine of their own compile it
gc.freeze()  # forks share the pages of these objects instead of copying them in their first collection
