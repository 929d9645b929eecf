# A worker: runs stages on one GPU, or with fewer gigabytes on the CPU. Build from the repository's root:
#   docker build -f docker/worker.Dockerfile -t pdtrim-worker:0.1.0 .
#   docker build -f docker/worker.Dockerfile -t pdtrim-worker:0.1.0-cpu --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
# `--build-arg EXTRAS="worker otel eval"` adds lm-evaluation-harness, for jobs that name its tasks.
ARG PYTHON_IMAGE=docker.io/library/python:3.12-slim-bookworm
FROM ${PYTHON_IMAGE} AS build
ARG EXTRAS="worker otel"
# An index whose builds of torch go before PyPI's, which is the one for CUDA and brings CUDA's libraries.
ARG TORCH_INDEX=""
WORKDIR /src
COPY docker/tools.txt ./
RUN python -m venv /opt/tools \
    && /opt/tools/bin/pip install --no-cache-dir --requirement tools.txt \
    && python -m venv --without-pip /opt/pdtrim
COPY constraints.txt pyproject.toml docker/requirements.py ./
RUN python requirements.py ${EXTRAS} > requirements.txt \
    && /opt/tools/bin/pip --python /opt/pdtrim/bin/python install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
        --constraint constraints.txt --requirement requirements.txt
COPY LICENSE README.md ./
COPY pdtrim pdtrim
COPY service service
COPY workers workers
RUN /opt/tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir . . \
    && /opt/tools/bin/pip --python /opt/pdtrim/bin/python install --no-cache-dir --no-deps ./*.whl \
    && /opt/tools/bin/pip --python /opt/pdtrim/bin/python check \
    && mkdir -p /opt/pdtrim/share \
    && /opt/tools/bin/cyclonedx-py environment --pyproject pyproject.toml \
        --output-reproducible --output-file /opt/pdtrim/share/sbom.cdx.json /opt/pdtrim/bin/python

FROM ${PYTHON_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="pdtrim-worker" \
    org.opencontainers.image.description="A worker of PDTrim Service: scores, prunes, distils and measures models" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.created="${CREATED}" \
    io.pdtrim.sbom.path="/opt/pdtrim/share/sbom.cdx.json" \
    io.pdtrim.sbom.format="CycloneDX JSON"
# Group 0, so that it works under whatever user a cluster chooses.
RUN useradd --uid 10001 --gid 0 --no-create-home --no-log-init --home-dir /var/lib/pdtrim pdtrim \
    && install -d -o 10001 -g 0 -m 0775 /var/lib/pdtrim
COPY --from=build /opt/pdtrim /opt/pdtrim
ENV HOME=/var/lib/pdtrim \
    PATH=/opt/pdtrim/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PDTRIM_DATA_DIR=/var/lib/pdtrim
USER 10001
WORKDIR /var/lib/pdtrim
# What NVIDIA's container runtime is asked for.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# SIGTERM: it takes nothing new, and hands its stage back when PDTRIM_SHUTDOWN_SECONDS are over.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=60s --timeout=20s --start-period=120s \
    CMD ["pdtrim", "ping"]
ENTRYPOINT ["pdtrim"]
CMD ["worker"]
