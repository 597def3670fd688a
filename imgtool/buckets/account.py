"""Who asks for a bucket, and where it is, told by what the clouds' own tools read.

For S3 the variables AWS_*, the files ~/.aws/credentials and ~/.aws/config (AWS_PROFILE), the roles of
containers and of EC2; for Google GOOGLE_APPLICATION_CREDENTIALS, what ``gcloud auth application-default
login`` left, and the service account of a machine of theirs. Where nothing of that is found, requests are not
signed: public buckets need no account. Machines of a cloud are known by their firmware, so nobody waits for a
metadata server that is not there.
"""

from __future__ import annotations

import configparser
import hashlib
import hmac
import importlib
import importlib.util
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from imgtool import files
from imgtool.errors import ImgtoolError

_FIRMWARE = Path("/sys/class/dmi/id")

_AWS = (
    "AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)  # fmt: skip
_GOOGLE = (
    "GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH",
    "GOOGLE_SERVICE_ACCOUNT_KEY", "GOOGLE_BEARER_TOKEN",
)  # fmt: skip
_KEYS = {
    "access_key_id": "aws_access_key_id",
    "secret_access_key": "aws_secret_access_key",
    "session_token": "aws_session_token",
}
"""Names of the keys here, and in the files of the AWS tools."""


def _made_by(*names: str) -> bool:
    """Tell whether this machine's firmware names one of these makers."""
    for file in ("sys_vendor", "product_name"):
        try:
            text = (_FIRMWARE / file).read_text(errors="replace")
        except OSError:
            continue
        if any(name in text for name in names):
            return True
    return False


def _true(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def s3(bucket: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of the store, beyond what obstore reads of AWS_*, and of its connections."""
    own = os.environ
    profile = {} if any(own.get(name) for name in _AWS) else _profile()
    config: dict[str, Any] = {name: profile[name] for name in _KEYS if name in profile}
    if "by" in profile:
        config["by"] = profile["by"]
    machine = not _true("AWS_EC2_METADATA_DISABLED") and _made_by("Amazon EC2")
    signed = config or machine or any(own.get(name) for name in _AWS)
    if not signed or _true("AWS_SKIP_SIGNATURE"):
        config["skip_signature"] = True
    endpoint = next(
        filter(None, map(own.get, ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"))),
        profile.get("endpoint_url", ""),
    )
    if endpoint:
        config["endpoint"] = endpoint
    if not (own.get("AWS_REGION") or own.get("AWS_DEFAULT_REGION")):
        config["region"] = profile.get("region") or ("us-east-1" if endpoint else _region(bucket))
    client: dict[str, Any] = {"allow_http": endpoint.startswith("http://")}
    bundle = own.get("AWS_CA_BUNDLE")
    if bundle and not client["allow_http"]:
        client["root_certificate"] = files.read(Path(bundle))
    return config, client


def _profile() -> dict[str, Any]:
    """Return what the files of the AWS tools say of the profile in use: keys, region, endpoint.

    Raises:
        ImgtoolError: There is no such profile; it signs in by a role or a browser, which needs boto3.
    """
    named = os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE")
    name = named or "default"
    home = Path.home() / ".aws"
    said = _section(Path(os.environ.get("AWS_CONFIG_FILE") or home / "config"), f"profile {name}", name)
    said |= _section(Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or home / "credentials"), name)
    if named and not said:
        raise ImgtoolError(f"there is no AWS profile {name}", "aws configure list-profiles tells their names")
    found: dict[str, Any] = {own: said[theirs] for own, theirs in _KEYS.items() if said.get(theirs)}
    found |= {each: said[each] for each in ("region", "endpoint_url") if said.get(each)}
    others = [each for each in said if each.startswith("sso_") or each in ("role_arn", "credential_process")]
    if others and "access_key_id" not in found:
        found["by"] = _by_boto3(name)
    return found


def _by_boto3(name: str) -> object:
    """Return what asks boto3 for credentials, again whenever they run out."""
    if importlib.util.find_spec("boto3") is None:
        hint = (
            f'pip install boto3, or: eval "$(aws configure export-credentials --profile {name} --format env)"'
        )
        raise ImgtoolError(f"the AWS profile {name} holds no keys but a way to get them", hint)
    session = importlib.import_module("boto3").Session(profile_name=name)
    return importlib.import_module("obstore.auth.boto3").Boto3CredentialProvider(session)


def _section(source: Path, *names: str) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None, strict=False, default_section="")
    try:
        parser.read(source.expanduser(), encoding="utf-8")
    except (configparser.Error, OSError, UnicodeDecodeError) as fault:
        raise ImgtoolError(f"cannot read {source}: {fault}", "aws configure writes a new one") from None
    return next((dict(parser[name]) for name in names if parser.has_section(name)), {})


_REGIONS: dict[str, str] = {}
"""Bucket to its region, as far as it was told: it is asked for once."""


def _region(bucket: str) -> str:
    """Return the region of a bucket of Amazon's, which tells it to everybody (header x-amz-bucket-region)."""
    if bucket in _REGIONS:
        return _REGIONS[bucket]
    request = urllib.request.Request(f"https://s3.amazonaws.com/{bucket}", method="HEAD")
    opener = urllib.request.build_opener(_Stay)
    try:
        with opener.open(request, timeout=10) as answer:
            headers = answer.headers
    except urllib.error.HTTPError as answer:
        headers = answer.headers
    except OSError:
        return "us-east-1"  # the first request of obstore says what is wrong with the network
    region = headers.get("x-amz-bucket-region")
    if region:
        _REGIONS[bucket] = str(region)
    return str(region or "us-east-1")


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows nothing."""

    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        """Decline."""


def gs() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of the store, beyond what obstore reads of GOOGLE_*, and of its connections."""
    emulator = os.environ.get("STORAGE_EMULATOR_HOST", "")
    if emulator:
        base = emulator if "://" in emulator else f"http://{emulator}"
        # A token that nobody checks: unsigned, obstore would ask the metadata server before it writes.
        config = {"base_url": base.rstrip("/"), "bearer_token": "emulator"}
        return config, {"allow_http": base.startswith("http://")}
    client = {"allow_http": os.environ.get("GOOGLE_BASE_URL", "").startswith("http://")}
    if _true("GOOGLE_SKIP_SIGNATURE"):
        return {"skip_signature": True}, client
    if any(os.environ.get(name) for name in _GOOGLE):
        return {}, client
    folder = os.environ.get("CLOUDSDK_CONFIG") or (
        Path(os.environ["APPDATA"], "gcloud") if "APPDATA" in os.environ else Path.home() / ".config/gcloud"
    )
    signed_in = Path(folder, "application_default_credentials.json")
    if signed_in.is_file():
        return {"application_credentials": str(signed_in)}, client
    cloud = ("GCE_METADATA_HOST", "K_SERVICE", "CLOUD_RUN_JOB")  # the last two: Cloud Run shows no firmware
    if any(os.environ.get(name) for name in cloud) or _made_by("Google"):
        return {}, client
    return {"skip_signature": True}, client


def listing(
    scheme: str, bucket: str, config: dict[str, Any], query: Mapping[str, str]
) -> tuple[str, dict[str, str]]:
    """Return the address and the headers that ask for a listing (ListObjectsV2, of both clouds' XML).

    Args:
        scheme: "s3" or "gs".
        bucket: The bucket's name.
        config: As ``s3`` and ``gs`` tell it.
        query: Parameters of the address.

    Raises:
        LookupError: Who asks is known to obstore alone: a role of a machine, or an account of Google's.
    """
    asked = "&".join(f"{quote(name, safe='')}={quote(query[name], safe='')}" for name in sorted(query))
    if scheme == "gs":
        base = config.get("base_url") or os.environ.get("GOOGLE_BASE_URL") or "https://storage.googleapis.com"
        token = config.get("bearer_token") or os.environ.get("GOOGLE_BEARER_TOKEN")
        if not token and not config.get("skip_signature"):
            raise LookupError
        return f"{base}/{bucket}?{asked}", {"Authorization": f"Bearer {token}"} if token else {}
    own = os.environ
    region = config.get("region") or own.get("AWS_REGION") or own["AWS_DEFAULT_REGION"]
    base = str(config.get("endpoint") or f"https://s3.{region}.amazonaws.com").rstrip("/")
    url = f"{base}/{quote(bucket)}?{asked}"
    return url, {} if config.get("skip_signature") else _signed(url, _keys(config), region)


def _keys(config: dict[str, Any]) -> tuple[str, str, str]:
    """Return the key, the secret and the token ("" where there is none) that sign."""
    told: Mapping[str, Any] = config
    if "by" in config:
        told = config["by"]() | {}
    elif "access_key_id" not in config:
        told = {name: os.environ.get(theirs.upper()) for name, theirs in _KEYS.items()}
    key, secret = told.get("access_key_id"), told.get("secret_access_key")
    if not key or not secret:
        raise LookupError
    return key, secret, told.get("session_token") or told.get("token") or ""


def _signed(url: str, keys: tuple[str, str, str], region: str) -> dict[str, str]:
    """Return the headers of a GET that is signed (AWS Signature Version 4, Amazon S3 API Reference)."""
    key, secret, token = keys
    parts, now = urlsplit(url), datetime.now(UTC)
    day, moment = f"{now:%Y%m%d}", f"{now:%Y%m%dT%H%M%SZ}"
    nothing = hashlib.sha256(b"").hexdigest()
    headers = {"x-amz-content-sha256": nothing, "x-amz-date": moment}
    headers |= {"x-amz-security-token": token} if token else {}
    lines = {"host": parts.netloc} | headers
    names = ";".join(lines)
    request = "\n".join(
        [
            "GET",
            parts.path,
            parts.query,
            *(f"{name}:{value}" for name, value in lines.items()),
            "",
            names,
            nothing,
        ]
    )
    scope = f"{day}/{region}/s3/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    made = f"AWS4{secret}".encode()
    for step in (*scope.split("/"), text):
        made = hmac.digest(made, step.encode(), "sha256")
    signature = f"AWS4-HMAC-SHA256 Credential={key}/{scope}, SignedHeaders={names}, Signature={made.hex()}"
    return headers | {"Authorization": signature}
