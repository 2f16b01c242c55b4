"""The tenants' file: what it may hold, and what is refused in which words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engine.tenants import TenantKey, Tenants, check_fits, load_tenants
from kvcache.errors import ConfigError
from scheduler.tenants import Tenant
from scheduler.urgency import ServiceClass

README = Path(__file__).resolve().parents[3] / "README.md"
SECRET = "sk-secret-1"


def write(folder: Path, text: str) -> Path:
    file = folder / "tenants.yaml"
    file.write_text(text)
    return file


def test_a_file_gives_tenants_their_keys_and_limits(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
        search: {api_keys: [k1, k2], weight: 2}
        nightly:
          api_keys: [k3]
          requests_per_minute: 60
          tokens_per_minute: 9000
          running_requests: 4
          highest_class: batch
        """,
    )
    tenants = load_tenants(file, other_keys=("k4",))
    nightly = Tenant("nightly", 60, 9000, 4, 1.0, ServiceClass.BATCH)
    assert tenants.tenants == (Tenant("search", weight=2), nightly, Tenant("default"))
    assert tenants.keys == (TenantKey("k1", "search"), TenantKey("k2", "search"), TenantKey("k3", "nightly"))
    assert tenants.weights == (("search", 2), ("nightly", 1), ("default", 1))


def test_without_a_file_everybody_is_the_default_tenant() -> None:
    assert load_tenants(None) == Tenants((Tenant("default"),), ())


def test_the_default_tenant_may_have_limits_and_needs_no_key(tmp_path: Path) -> None:
    file = write(tmp_path, "default: {running_requests: 2}")
    assert load_tenants(file) == Tenants((Tenant("default", running_requests=2),), ())


def test_the_example_in_the_readme_can_be_loaded(tmp_path: Path) -> None:
    example = re.search(r"```yaml\n(# tenants.yaml\n.*?)```", README.read_text(), re.DOTALL)
    assert example is not None
    tenants = load_tenants(write(tmp_path, example[1]))
    assert len(tenants.keys) >= 2
    check_fits(tenants, None, 8192)


BAD = [
    ("a: {api_keys: [k], burst: 3}", "'burst'"),
    ("a: {api_keys: [k], running_requests: 0}", "running_requests of the tenant 'a' .* is 0"),
    ("a: {api_keys: [k], requests_per_minute: -1}", "requests_per_minute of the tenant 'a' .* is -1"),
    ("a: {api_keys: [k], tokens_per_minute: 1.5}", "tokens_per_minute of the tenant 'a' .* is 1.5"),
    ("a: {api_keys: [k], running_requests: true}", "running_requests of the tenant 'a' .* is True"),
    ("a: {api_keys: [k], weight: 0}", "weight of the tenant 'a' .* is 0"),
    ("a: {api_keys: [k], weight: .nan}", "weight of the tenant 'a' .* is nan"),
    ("a: {api_keys: [k], highest_class: vip}", "highest_class of the tenant 'a' .* is 'vip'"),
    ("a: {weight: 1}", "tenant 'a' .* has no api_keys"),
    ("a: {api_keys: []}", "tenant 'a' .* has no api_keys"),
    ("a: {api_keys: ['']}", "api_keys of the tenant 'a'"),
    ("a: {api_keys: [17]}", "api_keys of the tenant 'a'"),
    ("a: [k]", "tenant 'a' .* must hold fields"),
    ("a b: {api_keys: [k]}", "'a b' .* must be called"),
    ("- a", "must hold names of tenants"),
    ("", "must hold names of tenants"),
    ("1: {api_keys: [k]}", "must hold names of tenants"),
    ("a: {api_keys: [k]}\na: {api_keys: [k2]}", "line 2: 'a' stands there twice"),
    ("a: {api_keys: [k], weight: 1, weight: 2}", "'weight' stands there twice"),
    ("a: {api_keys: [k", "not valid YAML"),
    (
        f"a: {{api_keys: [{SECRET}]}}\nb: {{api_keys: [{SECRET}]}}",
        "api_keys of the tenant 'b' .* also one of tenant 'a'",
    ),
    (f"a: {{api_keys: [{SECRET}, {SECRET}]}}", "also one of tenant 'a'"),
    ("a: {api_keys: [given]}", "also one of --api-key"),
    (f"a: {{api_keys: ['{SECRET} ']}}", "api_keys of the tenant 'a'"),
    (f"a: {{api_keys: [{SECRET}, &x *y]}}", "not valid YAML"),
]


@pytest.mark.parametrize(("text", "message"), BAD)
def test_bad_files_are_refused_in_one_sentence_without_a_key(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as refusal:
        load_tenants(file, other_keys=("given",))
    sentence = str(refusal.value)
    assert str(file) in sentence
    assert "\n" not in sentence
    assert SECRET not in sentence


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read: No such file"):
        load_tenants(tmp_path / "none.yaml")


def test_tokens_per_minute_below_one_request_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path, "a: {api_keys: [k], tokens_per_minute: 1000}")
    tenants = load_tenants(file)
    check_fits(tenants, file, 1000)
    with pytest.raises(ConfigError, match=r"tokens_per_minute of the tenant 'a' in .*tenants\.yaml is 1000: .* 1001"):
        check_fits(tenants, file, 1001)
