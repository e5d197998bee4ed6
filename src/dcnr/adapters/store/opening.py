"""From the URL of ``--store`` to a store that has shown that it is fit."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dcnr.adapters.store.folder import FolderStore
from dcnr.adapters.store.names import checked
from dcnr.adapters.store.probe import probe
from dcnr.config import LIMITS, Limits
from dcnr.errors import AlreadyExists, CorruptObject, NotFound, NotInThisVersion, StoreError, StoreUnavailable
from dcnr.network.graph import json_bytes
from dcnr.runtime.ports import Store

IDENTITY_KEY = "store.json"
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PREFIX_CHARACTERS = 200


async def open_store(url: str, environment: Mapping[str, str], limits: Limits = LIMITS) -> Store:
    """Open the store at a plain path, ``file:///folder`` or ``s3://bucket/prefix``, making it if it is new.

    ``environment`` has the variables ``AWS_*`` that say where the S3 server is (its keys obstore takes from the
    process's own). Raises :class:`NotInThisVersion` for other kinds of store, :class:`StoreError` for a URL that is
    none, :class:`StoreUnavailable` with name and reason where the store cannot be used or fails the probe,
    :class:`CorruptObject` for a damaged ``store.json``.
    """
    if urlsplit(url).scheme == "s3" and "://" in url:
        # Who starts a program wants to hear soon that the store is not there.
        soon = replace(limits, store_give_up_s=limits.store_open_s, store_request_timeout_s=limits.store_open_s)
        await _prove(_bucket(url, environment, soon))
        return _bucket(url, environment, limits)
    store = await asyncio.to_thread(FolderStore, _folder(url))
    await _prove(store)
    return store


async def _prove(store: Store) -> None:
    """That it is fit and of this format; gives a new one its identity."""
    try:
        _check(store, await store.get(IDENTITY_KEY))
        new = False
    except NotFound:
        new = True
    await probe(store)
    if new:
        with suppress(AlreadyExists):
            await store.create(IDENTITY_KEY, json_bytes({"format": 1, "id": secrets.token_hex(16)}))


def _check(store: Store, data: bytes) -> None:
    try:
        identity = json.loads(data)
        form = identity["format"]
        str(identity["id"])
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptObject(f"{store.url}/{IDENTITY_KEY} is damaged: {error}") from error
    if form != 1:
        raise StoreUnavailable(f"{store.url} has storage format {form}; this version reads format 1")


def _folder(url: str) -> Path:
    if "://" not in url:
        return Path(url).expanduser().absolute()
    parts = urlsplit(url)
    if parts.scheme != "file":
        raise NotInThisVersion(
            f"--store {url}: not in this version; give a folder, file:///folder or s3://bucket/prefix"
        )
    if parts.netloc not in ("", "localhost"):
        raise StoreError(f"--store {url}: a file URL has three slashes: file:///folder")
    return Path(unquote(parts.path))


def _bucket(url: str, environment: Mapping[str, str], limits: Limits) -> Store:
    # Loaded where it is needed: most orchestrators have a folder, and obstore is 20 MB.
    from dcnr.adapters.store.s3 import S3Store

    parts = urlsplit(url)
    prefix = parts.path.strip("/")
    if not _BUCKET.fullmatch(parts.netloc) or parts.query or parts.fragment:
        raise StoreError(
            f"--store {url}: expected s3://bucket/prefix, with a bucket of 3 to 63 small letters and digits"
        )
    if prefix and len(checked(prefix)) > _PREFIX_CHARACTERS:
        raise StoreError(f"--store {url}: the prefix has {len(prefix)} characters; {_PREFIX_CHARACTERS} are taken")
    endpoint = next((environment[name] for name in _ENDPOINTS if environment.get(name)), None)
    if endpoint is not None:
        where = urlsplit(endpoint)
        if where.scheme not in ("http", "https") or not where.hostname:
            raise StoreError(f"the S3 endpoint is to be http://host:port or https://host, found {endpoint!r}")
    return S3Store(parts.netloc, prefix or None, endpoint, limits)
