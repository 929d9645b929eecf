"""The one configuration, read once from the environment (`PDTRIM_…`) and passed on as values."""

from __future__ import annotations

from functools import cached_property
from ipaddress import ip_address
from pathlib import Path
from typing import Literal, Self
from urllib.parse import quote, unquote, urlsplit

from pydantic import Field, IPvAnyNetwork, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy import make_url

from pdtrim.contract.access import Quotas, Rate, Scope
from pdtrim.contract.queues import DEFAULT_QUEUE, QueueName
from service.sources.names import LocalPath, check_allowed, check_prefix

DATABASES = {
    **dict.fromkeys(("postgres", "postgresql", "postgresql+psycopg"), "postgresql+psycopg"),
    **dict.fromkeys(("sqlite", "sqlite+pysqlite"), "sqlite"),
}
"""From how an address begins to what SQLAlchemy calls the driver that comes with the service."""


class Settings(BaseSettings):
    """Where things are and how long they may take. With nothing set, everything lives in `data_dir`."""

    # Errors that quote their input would quote keys and passwords.
    model_config = SettingsConfigDict(env_prefix="PDTRIM_", extra="ignore", hide_input_in_errors=True)

    data_dir: Path = Field(default=Path("pdtrim-data"), description="Folder of everything that has no address.")
    database_url: str = Field(
        default="",
        description="`postgresql://user:password@host/name` or `sqlite:///…`; by default SQLite in the data folder.",
    )
    broker_url: str = Field(
        default="",
        description="`redis://host:6379/0` (Redis ≥ 6.2 or Valkey); by default files in the data folder, which need no "
        "server.",
    )
    artifacts_url: str = Field(
        default="",
        description="`s3://bucket/prefix`, with credentials as boto3 finds them (`AWS_*`), or `file:///folder`; by "
        "default a folder in the data folder.",
    )
    s3_endpoint_url: str | None = Field(default=None, description="For S3-compatible stores other than AWS.")
    s3_public_endpoint_url: str | None = Field(
        default=None, description="Address of the store in presigned links, where users reach it under another name."
    )
    s3_region: str | None = Field(default=None, description="Region of the bucket; by default what AWS_* says.")
    presign_seconds: int = Field(default=3600, ge=1, le=604800, description="Life of a presigned download link.")

    host: str = Field(default="127.0.0.1", description="Address the gateway binds to.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port the gateway binds to.")
    max_connections: int = Field(
        default=1000,
        ge=1,
        description="Connections to a gateway at once; beyond them, the one that waited longest for a request is "
        "closed. There are never more than files that the process may open, less what it needs itself.",
    )
    api_key: SecretStr | None = Field(
        default=None,
        description="The operator's bearer token, which opens all of the project `default`; may be absent only on a "
        "loopback address, or where there is an OpenID issuer.",
    )
    rate_limit: Rate = Field(
        default="6000/minute",
        description="Requests that each key may make, unless it has a limit of its own: a number and `second`, "
        "`minute`, `hour` or `day`, or `none`.",
    )
    failed_auth_limit: Rate = Field(
        default="30/minute", description="Keys that do not open which an address may send before it has to wait."
    )
    session_secret: SecretStr | None = Field(
        default=None,
        min_length=16,
        description="Encrypts the dashboard's session cookies: 16 random characters or more, the same for all "
        "gateways. By default each makes up its own when it starts.",
    )
    max_running_jobs: int | None = Field(
        default=None,
        ge=1,
        description="Jobs of a project that run at once; the others wait. By default any number. Workers and "
        "reconcilers read it, too.",
    )
    max_queued_jobs: int | None = Field(
        default=None, ge=1, description="Jobs of a project that may be queued; by default any number."
    )
    max_artifact_bytes: int | None = Field(
        default=None, ge=1, description="A project that keeps as many bytes of artifacts gets no new job."
    )
    oidc_issuer: str | None = Field(
        default=None, description="URL of the OpenID provider whose tokens open, too; by default there is none."
    )
    oidc_audience: str | None = Field(default=None, description="What has to be in a token's `aud`.")
    oidc_project_claim: str = Field(
        default="project", min_length=1, description="The claim that names the project; `a.b` is `b` within `a`."
    )
    oidc_scopes_claim: str = Field(
        default="scope", min_length=1, description="The claim that says what is allowed: a list, or words in a text."
    )
    oidc_scopes: dict[str, Scope] = Field(
        default={f"pdtrim:{scope}": scope for scope in Scope},
        description="JSON object: from what that claim says to `read`, `submit` or `admin`.",
    )
    max_body_bytes: int = Field(default=2_000_000, ge=1024, description="Largest request body.")

    allowed_sources: list[str] = Field(
        default=["reference", "builtin:", "hf://"],
        description="JSON list of the model and text sources that jobs may name, as URI prefixes; `pdtrim up` and "
        "`demo` add the current folder, unless this is set.",
    )
    max_model_bytes: int = Field(
        default=10**12,
        ge=1,
        description="Most bytes that a model's files may have in all; summed before any is fetched.",
    )
    scratch_dir: Path | None = Field(
        default=None,
        description="Workers' scratch folder and model cache; by default in the data folder. Hub caches too, unless "
        "`HF_HOME` is set.",
    )

    model_cache_bytes: int | None = Field(
        default=None,
        ge=0,
        description="Most bytes of hub and S3 models that workers keep in the scratch folder; those used longest ago "
        "go first, those in use never. By default half of that disk.",
    )

    queues: list[QueueName] = Field(
        default=[DEFAULT_QUEUE],
        min_length=1,
        max_length=100,
        description="JSON list of the queues that jobs may name, and workers take stages from; the first is for jobs "
        "that name none.",
    )
    memory_bytes: int | None = Field(
        default=None,
        ge=1,
        description="What a worker plans to take of its device's memory: of each GPU, or where there is none of the "
        "machine's, its own code included. By default what is free, or what its container leaves. What does not fit "
        "is sharded, or read from disk block by block.",
    )
    lease_seconds: float = Field(default=30.0, gt=0, description="A stage whose worker is silent this long is retaken.")
    reconcile_seconds: float = Field(default=5.0, gt=0, description="Pause between two sweeps of the reconciler.")
    reconcile_in_gateway: bool = Field(
        default=True, description="Run the reconciler in the gateway; false where `pdtrim reconcile` runs."
    )
    resend_seconds: float = Field(
        default=30.0, gt=0, description="A queued stage that no worker took is sent again after this, then 2×, 4×, …"
    )
    max_attempts: int = Field(
        default=5,
        ge=1,
        description="Workers that may die over one stage before its job fails; counted anew after a resume.",
    )
    stage_deadline_seconds: float = Field(
        default=604_800,
        gt=0,
        le=1e8,
        description="Longest time of a stage, from its first start. A job's `deadline_seconds` may be shorter.",
    )
    retry_seconds: float = Field(
        default=60.0,
        ge=0,
        description="How long a worker tries again what database or store did not do, before it gives up the attempt.",
    )
    shutdown_seconds: float = Field(
        default=5.0,
        ge=0,
        description="How long a worker that is told to stop works on; what is not done by then it hands back, at no "
        "cost of an attempt. (`docker stop` kills after 10 s.)",
    )
    retention_days: float | None = Field(
        default=None,
        gt=0,
        le=36500,
        description="Finished jobs are deleted after this, as by `DELETE`; paused ones are not. By default they stay.",
    )
    retention_bytes: int | None = Field(
        default=None,
        ge=1,
        description="While all jobs keep more bytes of artifacts, those that finished first are deleted; by default "
        "none is.",
    )
    upload_hours: float = Field(
        default=48.0, gt=0, le=87600, description="An upload to S3 that is unfinished for so long is aborted."
    )

    webhook_allowed_networks: list[IPvAnyNetwork] = Field(
        default=[], description="JSON list of networks that webhooks may reach although they are not public."
    )
    webhook_allow_http: bool = Field(
        default=False, description="Whether webhooks may use http:// outside of `webhook_allowed_networks`."
    )
    webhook_failing_days: float = Field(
        default=5.0, gt=0, le=365, description="A webhook that only failed for so long is disabled."
    )

    mlflow_tracking_uri: str | None = Field(
        default=None,
        description="MLflow server on which every job becomes a run, and its checkpoints registered models; by default "
        "none. Credentials are MLflow's own variables.",
    )
    mlflow_experiment: str = Field(default="pdtrim", min_length=1, description="The experiment of those runs.")
    hub_push_organisations: list[str] = Field(
        default=[], description="JSON list of the hub's organisations and users into which jobs may be pushed."
    )
    hub_push_token: SecretStr | None = Field(
        default=None, description="Token with which checkpoints are pushed; by default the one in HF_TOKEN."
    )

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="Least severe log lines that are written."
    )
    log_format: Literal["json", "console"] | None = Field(
        default=None, description="Form of log lines; by default `console` at a terminal, else `json`."
    )
    worker_metrics_port: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description="Port on which a worker serves its metrics, on every address; by default none.",
    )

    @field_validator("log_level", mode="before")
    @classmethod
    def _in_capitals(cls, level: object) -> object:
        return level.upper() if isinstance(level, str) else level

    @field_validator("session_secret", mode="before")
    @classmethod
    def _none_if_empty(cls, secret: object) -> object:
        return secret or None

    @field_validator("database_url")
    @classmethod
    def _has_a_driver(cls, url: str) -> str:
        """The address with the name of the driver that we have. Raises: ValueError that shows none of it."""
        scheme, separator, rest = url.partition("://")
        if url and not (separator and scheme in DATABASES):
            raise ValueError("give postgresql://user:password@host/name, or sqlite:////folder/file.db")
        return f"{DATABASES[scheme]}://{rest}" if url else url

    @field_validator("allowed_sources")
    @classmethod
    def _are_prefixes(cls, prefixes: list[str]) -> list[str]:
        for prefix in prefixes:
            check_prefix(prefix)
        return prefixes

    @model_validator(mode="after")
    def _fill_from_data_dir(self) -> Self:
        self.data_dir = self.data_dir.resolve()
        self.database_url = self.database_url or f"sqlite:///{quote(str(self.data_dir / 'pdtrim.db'))}"
        self.broker_url = self.broker_url or f"filesystem://{quote(str(self.data_dir / 'broker'))}"
        self.artifacts_url = self.artifacts_url or (self.data_dir / "artifacts").as_uri()
        self.scratch_dir = (self.scratch_dir or self.data_dir / "scratch").resolve()
        return self

    @model_validator(mode="after")
    def _key_unless_loopback(self) -> Self:
        if self.api_key is None and self.oidc_issuer is None and not self.binds_loopback:
            raise ValueError(
                f"the gateway would listen on {self.host} without a key; set PDTRIM_API_KEY, or PDTRIM_HOST=127.0.0.1"
            )
        return self

    @model_validator(mode="after")
    def _whole_issuer(self) -> Self:
        if self.oidc_issuer is not None:
            if not is_authentic(self.oidc_issuer):
                raise ValueError("PDTRIM_OIDC_ISSUER begins with https://, or with http:// and a loopback address")
            if not self.oidc_audience:
                raise ValueError(
                    "PDTRIM_OIDC_ISSUER needs PDTRIM_OIDC_AUDIENCE: tokens for other services must not open"
                )
        return self

    @property
    def quotas(self) -> Quotas:
        """What every project may have at once."""
        return Quotas.model_validate(self)

    @cached_property
    def own_places(self) -> tuple[Path, ...]:
        """Where the service keeps what is its own, or its projects': no source lies there."""
        urls = map(urlsplit, (self.broker_url, self.artifacts_url))
        folders = [Path(unquote(url.path)) for url in urls if url.scheme in ("filesystem", "file")]
        database = make_url(self.database_url)
        if database.get_backend_name() == "sqlite" and database.database:
            folders += [Path(f"{database.database}{ending}") for ending in ("", "-wal", "-shm")]
        return tuple(place.resolve() for place in (self.data_dir, self.scratch_dir or self.data_dir, *folders))

    def permit(self, path: Path) -> None:
        """Hold a file's place, without links, against the allow list. Raises: ForbiddenSource."""
        check_allowed(LocalPath(path), self.allowed_sources, self.own_places)

    @cached_property
    def binds_loopback(self) -> bool:
        return _is_loopback(self.host)


def is_authentic(url: str) -> bool:
    """Whether nobody on the network can forge what is read from a URL: it is https, or on this machine."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    return bool(host) and (parts.scheme == "https" or (parts.scheme == "http" and _is_loopback(host)))


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
