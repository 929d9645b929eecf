# A worker: runs stages on one GPU, or on the CPU with
#   docker build -f docker/worker.Dockerfile --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu -t pdtrim-worker .
FROM python:3.12-slim AS build
ARG TORCH_INDEX=""
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN python -m venv /opt/pdtrim \
    && if [ -n "$TORCH_INDEX" ]; then \
        /opt/pdtrim/bin/pip install --no-cache-dir --constraint constraints.txt --index-url "$TORCH_INDEX" torch; \
    fi
COPY service service
COPY workers workers
RUN /opt/pdtrim/bin/pip install --no-cache-dir --constraint constraints.txt ".[worker]"

FROM python:3.12-slim
COPY --from=build /opt/pdtrim /opt/pdtrim
RUN useradd --uid 10001 --create-home --home-dir /var/lib/pdtrim pdtrim
USER 10001
WORKDIR /var/lib/pdtrim
ENV PATH=/opt/pdtrim/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PDTRIM_DATA_DIR=/var/lib/pdtrim
STOPSIGNAL SIGTERM
CMD ["pdtrim", "worker"]
