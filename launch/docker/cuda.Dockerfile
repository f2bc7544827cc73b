# bigdssm on NVIDIA GPUs, from the repository's root:
#
#   docker build -f launch/docker/cuda.Dockerfile -t bigdssm:cuda .
#   docker run --rm --user "$(id -u)" --gpus all --shm-size 8g -v "$PWD/datasets:/workspace/datasets" \
#     -v "$PWD/runs:/workspace/runs" bigdssm:cuda \
#     bigdssm pretrain --config configs/movielens_100k.yaml
#
# PyTorch includes CUDA libraries; DeepSpeed (nvcc), Triton and torch.compile need the image's toolkit and compiler. See
# launch/trainjob.yaml and launch/slurm.sbatch for several machines.
FROM nvidia/cuda:12.8.1-devel-ubuntu24.04

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
RUN pip install --no-cache-dir ".[serve,remote]"
COPY launch launch
COPY tools tools
COPY configs configs

# The container runs as any user, such as the owner of the mounts; caches need a home and a user name.
# hadolint ignore=DL3064
ENV TOKENIZERS_PARALLELISM=false HOME=/tmp USER=trainer
USER 10001
CMD ["bigdssm", "--help"]
