"""What stages recorded before results had models: rows and artifacts of version 0.1.0's first form, as it wrote them.

`pair` is a job with a bound, merges, a token rule and narrower MLPs, `unified` one without distillation, `cut` one that
was cut from another.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

EARLIER: dict[str, dict[str, dict[str, Any]]] = json.loads(Path(__file__).with_name("earlier_results.json").read_text())
"""Job → `metrics` by stage, and `artifacts` by name."""
