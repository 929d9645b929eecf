from __future__ import annotations

from tests.gateway import model
from tests.unit.service.api.conftest import gateway_settings

__all__ = ["gateway_settings", "model"]
