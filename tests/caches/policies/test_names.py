"""Policies stand among the caches they act on, each under one name."""

import pytest

from foveal import caches
from foveal.caches import policies
from foveal.caches.policies import POLICIES, ElasticCache


@pytest.mark.parametrize("kind", [*POLICIES.values(), ElasticCache])
def test_a_policy_is_found_among_the_caches(kind: type) -> None:
    assert getattr(caches, kind.__name__) is kind


def test_what_is_not_there_is_an_attribute_error() -> None:
    assert caches.__getattr__("policies") is policies
    with pytest.raises(AttributeError, match="SnapKv"):
        caches.SnapKv  # noqa: B018
