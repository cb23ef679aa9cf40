"""What is sent to a Grafana: folder, data source, dashboard. A thin layer over ``grafana-api``.

That package has had no release since 2020; it needs nothing but requests, and Grafana still
answers what it asks. Nothing else in the code knows it. Data sources are addressed by uid, which
it has no method for: newer Grafanas know no other way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from cluster.errors import MonitorError
from cluster.monitoring.dashboard import FOLDER, FOLDER_UID, SOURCE_UID, UID, dashboard
from cluster.monitoring.files import source

TIMEOUT_S = 10.0
LOOPBACKS = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True, slots=True)
class Address:
    """Where a Grafana answers."""

    scheme: str
    host: str
    port: int | None
    prefix: str
    """Of its paths: empty, or it ends with a slash."""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read ``http(s)://host[:port][/prefix]``; MonitorError on anything else."""
        parts = urlsplit(text)
        try:
            port = parts.port
        except ValueError:
            port = -1
        wrong = parts.username or parts.password or parts.query or parts.fragment
        if parts.scheme not in {"http", "https"} or not parts.hostname or port == -1 or wrong:
            # not repeated: it may hold a password
            raise MonitorError(
                "--url must be http(s)://HOST[:PORT][/PREFIX], without a user name; the token "
                "goes into --token-file"
            )
        prefix = parts.path.strip("/")
        return cls(parts.scheme, parts.hostname, port, f"{prefix}/" if prefix else "")

    @property
    def is_open(self) -> bool:
        """Whether a token travels to it unencrypted over a network."""
        return self.scheme == "http" and self.host not in LOOPBACKS

    @property
    def url_host(self) -> str:
        """The host as a URL spells it."""
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def root(self) -> str:
        """The URL without its prefix: Grafana's own links bring that along."""
        return f"{self.scheme}://{self.url_host}{f':{self.port}' if self.port else ''}"

    def __str__(self) -> str:
        return f"{self.root}/{self.prefix}".rstrip("/")


class Grafana:
    """One Grafana. Every method raises MonitorError when it cannot be done, and says why."""

    def __init__(self, address: Address, token: str, timeout_s: float = TIMEOUT_S) -> None:
        """``timeout_s`` bounds the connection and each wait for bytes."""
        from grafana_api.grafana_face import GrafanaFace

        self._address = address
        self._face = GrafanaFace(
            auth=token,
            host=address.url_host,
            port=address.port,
            url_path_prefix=address.prefix,
            protocol=address.scheme,
            timeout=timeout_s,
        )
        if address.host in LOOPBACKS:
            self._face.api.s.trust_env = False  # no proxy for loopback

    def see_to_folder(self) -> bool:
        """Make the folder unless it is there; returns whether it is new."""
        with self._told("the folder"):
            try:
                self._face.folder.get_folder(FOLDER_UID)
            except Exception as error:
                if _status(error) != 404:
                    raise
                self._face.folder.create_folder(FOLDER, FOLDER_UID)
                return True
            return False

    def put_source(self, prometheus: str) -> bool:
        """Make the data source or bring it up to date; returns whether it is new."""
        with self._told("the data source (a token of role Admin may write it; or --no-source)"):
            body, path = source(prometheus), f"/datasources/uid/{SOURCE_UID}"
            try:
                held = self._face.api.GET(path)
            except Exception as error:
                if _status(error) != 404:
                    raise
                self._face.datasource.create_datasource(body)
                return True
            if any(held.get(key) != value for key, value in body.items() if key != "jsonData"):
                self._face.api.PUT(path, json=body)
            return False

    def put_dashboard(self, version: int, overwrite: bool) -> tuple[int, str]:
        """Write the dashboard over ``version`` (0: there is none); returns its new one and path.

        MonitorError when Grafana holds another version, unless ``overwrite``.
        """
        with self._told("the dashboard"):
            body = {
                "dashboard": {**dashboard(), "id": None, "version": version},
                "folderUid": FOLDER_UID,
                "overwrite": overwrite,
                "message": "roundhouse monitor push",
            }
            saved = self._face.dashboard.update_dashboard(body)
            return int(saved["version"]), str(saved["url"])

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        import requests

        try:
            yield
        except requests.Timeout:
            raise MonitorError(f"Grafana at {self._address} did not answer in time") from None
        except requests.ConnectionError as error:
            kind = "its certificate is not trusted" if "SSL" in str(error) else "nobody answers"
            raise MonitorError(
                f"Grafana at {self._address} cannot be reached: {kind}; check --url"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, requests.RequestException):
            # what came back was no JSON, or not the one that was asked for
            raise MonitorError(
                f"{self._address} does not answer as Grafana does; check --url, and its prefix"
            ) from None
        except Exception as error:
            if (status := _status(error)) is None:
                raise
            raise MonitorError(self._why(status, what, error)) from None

    def _why(self, status: int, what: str, error: Exception) -> str:
        if status == 401:
            return (
                f"Grafana at {self._address} refused the token (401): make one under "
                "Administration, Service accounts, and give its file with --token-file"
            )
        if status == 403:
            return f"the token may not write {what}: Grafana at {self._address} answered 403"
        if status == 412:
            return (
                f"the dashboard {UID} at {self._address} was changed since it was pushed from "
                "here, or pushed from elsewhere; --overwrite replaces it"
            )
        return f"Grafana at {self._address} refused {what}: {status} {_message(error)}"


def _status(error: Exception) -> int | None:
    from grafana_api.grafana_api import GrafanaException

    return int(error.status_code) if isinstance(error, GrafanaException) else None


def _message(error: Exception) -> str:
    """Return what Grafana said, in one short line."""
    said = getattr(error, "response", "")
    text = said.get("message", "") if isinstance(said, dict) else said
    return " ".join(str(text).split())[:200]
