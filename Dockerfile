# Training and measuring on a GPU node:
#
#   docker build --tag ssl_geometry:0.1.0 .
#   docker run --rm --gpus all --ipc host --volume "$PWD/runs:/workspace/runs" ssl_geometry:0.1.0 --config configs/quickstart/simclr.yaml
#
# The base has no CUDA: torch's wheels carry the CUDA runtime, cuDNN and NCCL, in the versions of constraints.txt, and a
# second CUDA below them would only add gigabytes. The driver is the host's (NVIDIA's container runtime, Apptainer's --nv).
FROM python:3.11-slim-bookworm

LABEL org.opencontainers.image.title="ssl_geometry" \
      org.opencontainers.image.description="Train self-supervised and supervised vision networks and watch the geometry of every layer while they learn." \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"

# torch.compile (--model.compile true) needs a C compiler.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# What NVIDIA's runtime mounts from the host: the driver's libraries and nvidia-smi. Caches go where any user may write.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    HOME=/tmp

WORKDIR /opt/ssl_geometry

# The dependencies (gigabytes) are a separate layer, which a change of the source does not rebuild.
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; print('\n'.join(tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']))" > requirements.txt \
    && python -m pip install --constraint constraints.txt --requirement requirements.txt

COPY README.md LICENSE ./
COPY ssl_geometry ssl_geometry
RUN python -m pip install --no-deps .

# Commands write to runs/ and data/ of the folder that they are started in; anybody may, as --user and Apptainer need.
WORKDIR /workspace
COPY configs configs
COPY slurm slurm
RUN useradd --uid 1000 user \
    && mkdir runs data \
    && chmod 1777 . runs data
USER user

ENTRYPOINT ["python", "-m", "ssl_geometry.fit"]
CMD ["--help"]
