"""Where a job is to be handed on to, by its specification and the service's settings."""

from __future__ import annotations

from pdtrim.contract.errors import PushNotAllowed
from pdtrim.contract.publications import PublicationTarget
from pdtrim.contract.spec import JobSpec
from service.settings import Settings


def targets(spec: JobSpec, settings: Settings) -> list[PublicationTarget]:
    """Where the job goes when it has succeeded."""
    wanted = {
        PublicationTarget.MLFLOW: settings.mlflow_tracking_uri is not None,
        PublicationTarget.HUB: spec.push_to_hub is not None,
    }
    return [target for target, is_wanted in wanted.items() if is_wanted]


def check_push(spec: JobSpec, settings: Settings) -> None:
    """Raises: PushNotAllowed for an organisation into which the service does not push."""
    if spec.push_to_hub is None:
        return
    organisation = spec.push_to_hub.repo.partition("/")[0]
    if organisation not in settings.hub_push_organisations:
        allowed = ", ".join(settings.hub_push_organisations) or "none"
        raise PushNotAllowed(
            f"The service does not push to {organisation!r} on the hub; it may push to: {allowed}. The operator can "
            "add one to PDTRIM_HUB_PUSH_ORGANISATIONS.",
            param="push_to_hub.repo",
        )
