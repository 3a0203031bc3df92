"""Older manifests become current ones here, one step a version.

A step takes the manifest of version ``n`` as plain data and returns that of version ``n + 1``. Version 0 is the layout
of pre-release builds: flat ``config`` values without their origin, and no ``environment``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trtllm_cli.artifacts.schema import SCHEMA_VERSION
from trtllm_cli.errors import BadInputError


def _from_0(data: dict[str, Any]) -> dict[str, Any]:
    config = data.get("config", {})
    if isinstance(config, dict):  # anything else is for the schema to refuse
        config = {key: {"value": value, "origin": "default"} for key, value in config.items()}
    return {"environment": {}, **data, "config": config, "schema_version": 1}


def _from_1(data: dict[str, Any]) -> dict[str, Any]:
    # no checkpoint of version 1 was calibrated; everything version 2 adds has a default
    return {**data, "schema_version": 2}


_STEPS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {0: _from_0, 1: _from_1}


def migrate(data: dict[str, Any], where: str) -> dict[str, Any]:
    """Bring ``data`` to the current version. Raises BadInputError for a newer or senseless version."""
    version = data.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 0:
        raise BadInputError(
            "MANIFEST_INVALID",
            f"{where} has no usable schema_version ({version!r})",
            "repeat the stage that wrote this artifact",
        )
    if version > SCHEMA_VERSION:
        raise BadInputError(
            "SCHEMA_NEWER",
            f"{where} has schema version {version}, this trtllm-cli reads up to {SCHEMA_VERSION}",
            "pip install --upgrade trtllm-cli",
        )
    while version < SCHEMA_VERSION:
        data = _STEPS[version](data)
        version += 1
    return data
