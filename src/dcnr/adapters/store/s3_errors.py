"""What an S3 server or the way to it said, from obstore's errors: they carry it as text alone."""

from __future__ import annotations

import re
import time

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_SAID = re.compile(r'(?:message|error): "([^"]+)"')
_NO_KEYS = re.compile(r"performing \w+ \S+/latest/(?:api/token|meta-data)")
"""Where the environment has no keys, obstore asks the cloud that this machine may be part of."""

_REASONS = {
    "NoSuchBucket": "it has no bucket {bucket}: create it, or correct --store",
    "InvalidBucketName": "{bucket} is no name for a bucket: correct --store",
    "InvalidAccessKeyId": "it does not know the key in AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY is not the secret of the key in AWS_ACCESS_KEY_ID",
    "ExpiredToken": "the token in AWS_SESSION_TOKEN has expired",
    "InvalidToken": "the token in AWS_SESSION_TOKEN is not valid",
    "AccessDenied": "the key in AWS_ACCESS_KEY_ID may not do this in bucket {bucket}",
    "QuotaExceeded": "the quota of bucket {bucket} is used up",
    "XMinioStorageFull": "its disks have no space left",
    "NotImplemented": "it does not know a call that is needed here: choose another --store",
}


class Failure:
    """One error of obstore's, understood."""

    def __init__(self, error: Exception) -> None:
        text = str(error)
        status, code = _STATUS.search(text), _CODE.search(text)
        self._head, _, self._source = text.partition("\n\nDebug source:")
        self._status = int(status[1]) if status else None
        self._code = code[1] if code else None
        self._no_keys = _NO_KEYS.search(text) is not None

    @property
    def no_such_object(self) -> bool:
        # The answer to HEAD has no body, and so no code. Any other 404 is about something else: a bucket, a proxy's page.
        return self._status == 404 and (self._code == "NoSuchKey" or "performing HEAD" in self._head)

    @property
    def beyond_the_end(self) -> bool:
        """The object is there and ends before the range begins."""
        return self._status == 416

    @property
    def conflict(self) -> bool:
        """Neither done nor refused: another write of the same name is under way."""
        return self._status == 409

    @property
    def unsent(self) -> bool:
        """The server cannot have acted on it. Of an answer that may be a proxy's nobody knows."""
        return "kind: Connect," in self._source

    @property
    def full(self) -> bool:
        """Nothing more fits, until somebody makes room."""
        return self._status == 507 or self._code in ("QuotaExceeded", "XMinioStorageFull")

    @property
    def passing(self) -> bool:
        """Whether the same call may succeed a moment later."""
        if self._no_keys or self.full:
            return False
        return self._status is None or self._status >= 500 or self._status in (408, 409, 429)

    def reason(self, bucket: str) -> str:
        """For people."""
        if self._no_keys or "Missing AccessKeyId" in self._head or "Missing SecretAccessKey" in self._head:
            return "there are no keys: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        if self._code == "RequestTimeTooSkewed":
            now = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
            return f"this machine's clock, which says {now} UTC, is too far from its own: set it (RequestTimeTooSkewed)"
        if self._code in _REASONS:
            return f"{_REASONS[self._code].format(bucket=bucket)} ({self._code})"
        if self._status is not None:
            return f"it answers {self._status} {self._code or ''}".rstrip()
        if "kind: Timeout" in self._source:
            return "no answer in time"
        if "IncompleteMessage" in self._source or "UnexpectedEof" in self._source:
            return "it closes the connection in the middle of an answer"
        if "InvalidContentType" in self._source:
            return "it does not speak TLS: is the endpoint http:// and not https://?"
        said = _SAID.search(self._source)
        return said[1] if said else self._head
