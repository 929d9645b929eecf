# The gateway: HTTP in, jobs out. No torch. Build from the repository's root:
#   docker build -f docker/gateway.Dockerfile -t pdtrim-gateway .
FROM python:3.12-slim AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY service service
COPY workers workers
RUN python -m venv /opt/pdtrim \
    && /opt/pdtrim/bin/pip install --no-cache-dir --constraint constraints.txt .

FROM python:3.12-slim
COPY --from=build /opt/pdtrim /opt/pdtrim
RUN useradd --uid 10001 --create-home --home-dir /var/lib/pdtrim pdtrim
USER 10001
WORKDIR /var/lib/pdtrim
ENV PATH=/opt/pdtrim/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PDTRIM_DATA_DIR=/var/lib/pdtrim \
    PDTRIM_HOST=0.0.0.0 \
    PDTRIM_PORT=8000
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=2)"]
CMD ["pdtrim", "serve"]
