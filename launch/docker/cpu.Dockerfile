# bigdssm on a CPU, from the repository's root:
#
#   docker build -f launch/docker/cpu.Dockerfile -t bigdssm:cpu .
#   docker run --rm --user "$(id -u)" -v "$PWD/datasets:/workspace/datasets" \
#     -v "$PWD/runs:/workspace/runs" bigdssm:cpu \
#     bigdssm pretrain --config configs/movielens_100k.yaml
#
# The default PyTorch for Linux may be a large CUDA build: if your registry has CPU builds, select them with pip's
# options, such as --build-arg PIP_EXTRA_INDEX_URL=… .
FROM python:3.12-slim

ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS

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
ENV DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HOME=/tmp USER=trainer
USER 10001
CMD ["bigdssm", "--help"]
