import json
import logging
import socket
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlunsplit

import pytest
from ttr_distill.comet import CometConfig, comet_sink, flatten_parameters, reachable
from ttr_distill.comet_metrics import DistillMetricNames
from ttr_distill.metrics import MetricValue

KEY = "A1b2C3d4E5f6G7h8I9j0KLMNO"


def row(layer: str, updates: int) -> dict[str, MetricValue]:
    return {"layer": layer, "updates": updates, "loss": 0.5, "ema_cosine": 0.2, "level": "ready"}


def url(port: int, scheme: str = "http") -> str:
    return urlunsplit((scheme, f"127.0.0.1:{port}", "/clientlib/", "", ""))


def log(config: CometConfig) -> None:
    sink = comet_sink(DistillMetricNames(every=10), config)
    started = time.perf_counter()
    sink.write(row("single:0", 12))
    sink.write(row("single:1", 3))
    assert time.perf_counter() - started < 0.1, "the sampling thread waited for Comet"
    sink.close()
    assert sink.dropped == 0


def archive(folder: Path) -> tuple[dict[str, object], list[dict[str, object]], bytes]:
    """Facts, messages and all bytes of the one archive in a folder."""
    (file,) = folder.glob("*.zip")
    with zipfile.ZipFile(file) as opened:
        contents = {name: opened.read(name) for name in opened.namelist()}
    messages = [json.loads(line) for line in contents["messages.json"].decode().splitlines()]
    return json.loads(contents["experiment.json"]), messages, b"".join(contents.values())


def metrics(messages: list[dict[str, object]]) -> dict[tuple[str, int], float]:
    found = [message["payload"]["metric"] for message in messages if message["type"] == "metric_msg"]
    return {(metric["metricName"], metric["step"]): metric["metricValue"] for metric in found}


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("COMET_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.usefixtures("no_key")
def test_without_a_key_everything_is_in_an_offline_archive(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("comet_ml")
    parameters = {"update": {"learning_rate": 1e-3}, "layers": ["single:0", "single:1"]}
    log(CometConfig(experiment="my run", offline_folder=tmp_path / "off", parameters=parameters))
    assert "no Comet key" in caplog.text
    facts, messages, _ = archive(tmp_path / "off")
    assert facts["offline_id"] == "myrun".ljust(32, "X")
    assert facts["project_name"] == "ttr-distillation"
    sent = metrics(messages)
    assert sent["flux2ttr/single:0/loss", 12] == 0.5
    assert sent["flux2ttr/global/pareto_frontier", 12] == 0.8
    assert sent["flux2ttr/global/pareto_frontier", 15] == 1.6, "closing sends what is left"
    shown = {
        message["payload"]["param"]["paramName"]: message["payload"]["param"]["paramValue"]
        for message in messages
        if message["type"] == "parameter_msg"
    }
    assert float(shown["update.learning_rate"]) == 1e-3
    assert shown["layers"] == "single:0,single:1"
    names = [message["payload"] for message in messages if message["type"] == "log_other"]
    assert any(str(name.get("value", "")).count("-") == 4 for name in names), names


@pytest.mark.enable_socket
@pytest.mark.usefixtures("no_key")
def test_a_key_without_a_network_means_offline_at_once_and_is_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("comet_ml")
    monkeypatch.setenv("COMET_API_KEY", KEY)
    monkeypatch.setenv("COMET_URL_OVERRIDE", url(9, "https"))
    caplog.set_level(logging.DEBUG)
    started = time.perf_counter()
    parameters = {"comet_api_key": KEY, "note": f"with {KEY} inside", "rate": 1.0}
    log(CometConfig(offline_folder=tmp_path / "off", parameters=parameters))
    assert time.perf_counter() - started < 15
    assert "Comet cannot be reached" in caplog.text
    facts, _, content = archive(tmp_path / "off")
    assert 32 <= len(str(facts["offline_id"])) <= 50
    printed = capfd.readouterr()
    for text in (content.decode(errors="replace"), caplog.text, printed.out, printed.err):
        assert KEY not in text
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or KEY.encode() not in file.read_bytes()


@pytest.mark.enable_socket
@pytest.mark.usefixtures("no_key")
def test_a_server_that_refuses_means_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A real server on this machine that answers every request with an error about the key."""
    pytest.importorskip("comet_ml")

    class Refuse(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            text = json.dumps({"msg": f"invalid key {KEY}", "code": 401, "sdk_error_code": 90212}).encode()
            self.send_response(401)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Refuse) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv("COMET_API_KEY", KEY)
        monkeypatch.setenv("COMET_URL_OVERRIDE", url(server.server_port))
        log(CometConfig(offline_folder=tmp_path / "off"))
        server.shutdown()
    assert "Comet took no experiment" in caplog.text
    mine = [record.getMessage() for record in caplog.records if record.name.startswith("ttr_distill")]
    assert not any(KEY in message for message in mine)
    archive(tmp_path / "off")


def test_without_the_package_one_warning_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "comet_ml", None)
    sink = comet_sink(DistillMetricNames())
    sink.write(row("single:0", 1))
    sink.close()
    assert caplog.text.count("install ttr-distill[comet]") == 1


def test_settings_are_flat_and_without_secrets() -> None:
    nested = {"a": {"b": 1, "comet_api_key": KEY, "c": {"d": (1, 2)}}, "Access-Token": KEY, "e": None}
    assert dict(flatten_parameters(nested)) == {"a.b": 1, "a.c.d": "1,2", "e": None}


@pytest.mark.enable_socket
def test_a_server_is_reachable_only_if_it_answers() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert reachable(url(server.server_port)), "an error is an answer"
        server.shutdown()
    assert not reachable(url(server.server_port))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.perf_counter()
        assert not reachable(url(silent.getsockname()[1]), seconds=0.2)
        assert time.perf_counter() - started < 3.0
    assert not reachable("nonsense")
