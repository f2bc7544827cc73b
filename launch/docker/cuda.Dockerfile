# bigdssm on NVIDIA GPUs, from the repository's root:
#
#   docker build -f launch/docker/cuda.Dockerfile -t bigdssm:cuda .
#   docker run --rm --user "$(id -u)" --gpus all --shm-size 8g -v "$PWD/datasets:/workspace/datasets" \
#     -v "$PWD/runs:/workspace/runs" bigdssm:cuda \
#     bigdssm pretrain --config configs/movielens_100k.yaml
#
# The CUDA libraries are those that PyTorch's wheel requires. nvcc, with which DeepSpeed compiles the optimizer of
# engine.offload_optimizer, is installed in the same version: another one would be refused. The host's driver is at least
# that of this CUDA version (13: 580). See launch/trainjob.yaml and launch/slurm.sbatch for several machines.
FROM ubuntu:24.04

ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS

# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends python3-dev python3-venv g++ \
    && rm -rf /var/lib/apt/lists/* && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

WORKDIR /workspace
COPY pyproject.toml README.md LICENSE ./
COPY bigdssm bigdssm
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[serve,remote]" "cuda-toolkit[nvcc,cccl]"
ENV CUDA_HOME=/opt/venv/lib/python3.12/site-packages/nvidia/cu13 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY launch launch
COPY tools tools
COPY configs configs

# The container runs as any user, such as the owner of the mounts; caches need a home and a user name.
# hadolint ignore=DL3064
ENV TOKENIZERS_PARALLELISM=false HOME=/tmp USER=trainer
USER 10001
CMD ["bigdssm", "--help"]
