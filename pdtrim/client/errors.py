"""What every method of the client raises, and whether trying again may help."""

from __future__ import annotations

import time

import httpx
from pydantic import ValidationError

from pdtrim.contract.errors import Problem, RequestInFlight
from pdtrim.contract.jobs import Job
from pdtrim.display.remedies import REMEDIES

RETRY_S = 0.5
PASSING_STATUSES = {502, 503, 504}
LOST = (httpx.ReadError, httpx.ReadTimeout, httpx.WriteError, httpx.WriteTimeout, httpx.RemoteProtocolError)
"""What breaks a request that may have arrived."""


class ClientError(Exception):
    """What every method of the client raises, in one of the kinds below."""


class ServiceError(ClientError):
    """The service refused a request; `problem` is its RFC 9457 answer. The message has all that is wrong.

    `retry_after` is how many seconds later, as it says, it is worth trying again.
    """

    def __init__(self, problem: Problem, *, retry_after: float | None = None) -> None:
        where = f" ({problem.param})" if problem.param else ""
        told = f"{problem.title}{where}: {problem.detail}"
        if problem.errors:
            lines = (f"{one.param}: {one.detail}" if one.param else one.detail for one in problem.errors)
            told = "\n- ".join(["There is more than one thing wrong with the request:", *lines])
        super().__init__(told)
        self.problem = problem
        self.retry_after = retry_after


class ServiceUnreachable(ClientError):
    """Nothing answers at the URL, or only a proxy that finds nothing behind it."""


class AnswerLost(ServiceUnreachable):
    """The connection broke after the request went out: what it asked for may have been done."""


class UnexpectedAnswer(ClientError):
    """Something answers at the URL, but not as this service does."""


class CorruptDownload(ClientError):
    """A downloaded file's SHA-256 is not the recorded one."""


class JobFailed(ClientError):
    """A job that was waited for failed, or was cancelled. `job` is the job as it ended.

    `code` is its error's, to program against, and `remedy` what to do about it; None where the job was cancelled.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.code = job.error.code if job.error else None
        self.remedy = REMEDIES.get(job.error.code) if job.error else None
        why = f"failed: {job.error.message} ({job.error.code})" if job.error else f"was {job.status}"
        super().__init__(" ".join(part for part in (job.id, why, self.remedy) if part))


class NothingToDownload(ClientError):
    """The job has no file of those that were asked for."""

    def __init__(self, job: Job, what: str, prefix: str) -> None:
        named = f" whose name begins with {prefix!r}" if prefix else ""
        told = f"{job.id} is {job.status} and has no file of its {what}{named}"
        super().__init__(f"{told}; `pdtrim artifacts {job.id}` lists what it has")


class UnsafeName(ClientError):
    """The service names an artifact so that it would lie outside the folder it is downloaded to."""


def silence(url: str, error: httpx.RequestError) -> ServiceUnreachable:
    """A request that got no answer."""
    kind = AnswerLost if isinstance(error, LOST) else ServiceUnreachable
    return kind(f"{url} does not answer ({error}); start the service with `pdtrim up`, or give its --url")


def unexpected(url: str) -> UnexpectedAnswer:
    """An answer that is none of this service's."""
    return UnexpectedAnswer(f"{url} does not answer as PDTrim Service does; is it the right URL?")


def refusal(url: str, response: httpx.Response) -> ClientError:
    """An answer that says no; its body has been read."""
    if response.headers.get("Content-Type", "").startswith("application/problem+json"):
        try:
            problem = Problem.model_validate_json(response.content)
        except ValidationError:
            return unexpected(url)
        return ServiceError(problem, retry_after=_seconds(response.headers))
    # A presigned link carries its credentials in the query.
    where = response.url.copy_with(query=None)
    if response.status_code in PASSING_STATUSES:
        # 503 comes from a proxy that passed nothing on; after 502 and 504 the service may have acted.
        kind = ServiceUnreachable if response.status_code == 503 else AnswerLost
        return kind(f"{where} answered {response.status_code}: nothing works behind it now")
    return UnexpectedAnswer(f"{where} answered {response.status_code}, but not as PDTrim Service does")


def may_pass(error: Exception) -> bool:
    """Whether the next try may fare better."""
    if isinstance(error, ServiceError):
        return error.problem.status in PASSING_STATUSES or is_limit(error)
    return isinstance(error, httpx.RequestError | ServiceUnreachable)


def is_limit(error: Exception) -> bool:
    """Whether the service asks to come back later."""
    return isinstance(error, ServiceError) and error.problem.status == 429


def is_in_flight(error: Exception) -> bool:
    """Whether an earlier request with the same Idempotency-Key is not answered yet."""
    return isinstance(error, ServiceError) and error.problem.code == RequestInFlight.code


def _seconds(headers: httpx.Headers) -> float | None:
    """`Retry-After`, where it is a number of seconds (our service sends no dates)."""
    given = headers.get("Retry-After", "")
    return float(given) if given.isdecimal() else None


class Patience:
    """How long the service has been out of reach, or has asked to wait, without a break."""

    def __init__(self, url: str, seconds: float) -> None:
        self._url, self._seconds = url, seconds
        self._silent_since: float | None = None

    def heard(self) -> None:
        """The service did something."""
        self._silent_since = None

    def pause_s(self, error: Exception) -> float:
        """Seconds to pause before the next try.

        Raises: ServiceUnreachable after too many tries; a limit that asks for too long.
        """
        now = time.monotonic()
        self._silent_since = self._silent_since or now
        waited_s, pause_s = now - self._silent_since, RETRY_S
        if isinstance(error, ServiceError) and is_limit(error):
            pause_s = max(RETRY_S, error.retry_after or 0.0)
            if waited_s + pause_s > self._seconds:
                raise error
        elif waited_s > self._seconds:
            raise ServiceUnreachable(f"{self._url} has not answered for {self._seconds:.0f} s: {error}") from error
        return pause_s
