# The gateway, which also reconciles and migrates: HTTP in, jobs out. No torch. Build from the repository's root:
#   docker build -f docker/gateway.Dockerfile -t pdtrim-gateway:0.1.0 .
# To hand jobs on to MLflow: --build-arg EXTRAS="service otel mlflow"
ARG PYTHON_IMAGE=docker.io/library/python:3.12-slim-bookworm
FROM ${PYTHON_IMAGE} AS build
ARG EXTRAS="service otel"
WORKDIR /src
COPY docker/tools.txt ./
RUN python -m venv /opt/tools \
    && /opt/tools/bin/pip install --no-cache-dir --requirement tools.txt \
    && python -m venv --without-pip /opt/pdtrim
COPY constraints.txt pyproject.toml docker/requirements.py ./
RUN python requirements.py ${EXTRAS} > requirements.txt \
    && /opt/tools/bin/pip --python /opt/pdtrim/bin/python install --no-cache-dir \
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
LABEL org.opencontainers.image.title="pdtrim-gateway" \
    org.opencontainers.image.description="The HTTP interface of PDTrim Service, its reconciler and its migrations" \
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
ENV PDTRIM_HOST=0.0.0.0 \
    PDTRIM_PORT=8000
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"PDTRIM_PORT\"]}/healthz', timeout=2)"]
ENTRYPOINT ["pdtrim"]
CMD ["gateway"]
