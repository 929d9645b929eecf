"""What to do about the errors that end jobs, by their code."""

from __future__ import annotations

REMEDIES = {
    "attempts_exhausted": "Look at the worker's log, then resume the job (`pdtrim resume`).",
    "deadline_exceeded": "Resume it: the stage gets as much time again. Or submit it with a longer "
    "`deadline_seconds`, or with less work.",
    "dependency_unavailable": "Resume it once the server that is named answers again.",
    "extra_not_installed": "Install the package on the workers, then resume the job.",
    "internal_error": "Look at the worker's log; if the service is at fault, report it with the job's id.",
    "invalid_input": "Correct the model or the specification and submit it again.",
    "invalid_request": "Correct the specification and submit it again.",
    "model_too_large": "Submit a smaller model, or have the operator raise PDTRIM_MAX_MODEL_BYTES.",
    "model_unsupported": "Submit a decoder-only model of an architecture that docs/guides/jobs.md lists, "
    "stored as safetensors, with the configuration that belongs to its tensors.",
    "out_of_memory": "Resume it on a worker with more memory, or submit it with fewer and shorter windows "
    "(calibration.windows, calibration.window_tokens), or with distillation.gradient_accumulation and "
    "distillation.gradient_checkpointing.",
    "source_not_allowed": "Submit it with a source that the service allows, or have the operator add it to "
    "PDTRIM_ALLOWED_SOURCES.",
    "source_unreadable": "Check the source's address, its files and the workers' right to read them, then resume the "
    "job.",
    "store_refused": "Have the operator check the artifact store's bucket and credentials, then resume the job.",
    "too_many_blocks": "Submit it with fewer blocks to remove.",
}
