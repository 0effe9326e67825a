from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_secure.errors import ConfigError
from lightning_secure.privacy.auditing import OneRunAudit

ROWS = [(torch.tensor([float(i)]), torch.tensor(0)) for i in range(10)]


def canaries(count):
    return TensorDataset(torch.arange(100.0, 100.0 + count).unsqueeze(1), torch.ones(count).long())


def test_each_canary_has_a_fair_coin_of_the_operating_systems():
    torch.manual_seed(0)
    one = OneRunAudit(canaries(2000))
    torch.manual_seed(0)
    other = OneRunAudit(canaries(2000))
    assert one.included != other.included
    assert 850 < sum(one.included) < 1150
    assert OneRunAudit(canaries(2000), included=one.included).included == one.included


def test_rows_are_kept_and_chosen_canaries_are_added():
    audit = OneRunAudit(canaries(3), included=[True, False, True])
    joined = audit.among(ROWS)
    assert [float(joined[i][0]) for i in range(len(joined))] == [*range(10), 100, 102]
    (values, labels) = next(iter(DataLoader(joined, batch_size=12)))
    assert values.flatten().tolist() == [*range(10), 100, 102]
    assert labels.tolist() == [0] * 10 + [1, 1]
    assert audit.public_size(ROWS) == 12


def test_a_dataset_that_reads_several_rows_at_once_still_does():
    class Batched(list):
        def __getitems__(self, indices):
            self.asked = indices
            return [self[index] for index in indices]

    rows = Batched(ROWS)
    joined = OneRunAudit(canaries(3), included=[True] * 3).among(rows)
    found = joined.__getitems__([11, 2, 10, 0])
    assert [float(row[0]) for row in found] == [101, 2, 100, 0]
    assert rows.asked == [2, 0]


def test_scores_are_losses_turned_around():
    audit = OneRunAudit(canaries(5))
    scores = audit.scores(lambda batch: batch[0].squeeze(1), batch_size=2)
    assert scores.tolist() == [-100, -101, -102, -103, -104]
    with pytest.raises(ConfigError, match="one loss a canary"):
        audit.scores(lambda batch: batch[0].mean())


def test_knowing_it_all_shows_a_large_epsilon():
    audit = OneRunAudit(canaries(1000))
    report = audit.report(torch.tensor(audit.included).float(), claimed=1.0, delta=1e-5)
    assert report.lower_bound > 3
    assert not report.holds


def test_knowing_nothing_shows_none():
    audit = OneRunAudit(canaries(1000))
    rng = np.random.default_rng(3)
    report = audit.report(torch.tensor(rng.random(1000)), claimed=1.0, delta=1e-5)
    assert report.lower_bound < 0.5
    assert report.holds
    # All alike, for example after no step: order says nothing about coins that come in a row.
    ordered = OneRunAudit(canaries(1000), included=[False] * 500 + [True] * 500)
    assert ordered.report(torch.zeros(1000), claimed=1.0, delta=1e-5).lower_bound < 0.8


def test_noise_of_one_sensitivity_shows_less_than_its_epsilon():
    audit = OneRunAudit(canaries(20_000))
    noise = np.random.default_rng(4).standard_normal(20_000)
    scores = torch.tensor(np.array(audit.included) + noise)
    report = audit.report(scores, claimed=4.3772, delta=1e-5)
    assert 1.0 < report.lower_bound <= 4.3772


def test_what_cannot_be_audited_is_refused():
    with pytest.raises(ConfigError, match="canaries must be"):
        OneRunAudit([])
    with pytest.raises(ConfigError, match="as many coins"):
        OneRunAudit(canaries(3), included=[True])
    with pytest.raises(ConfigError, match="as many scores"):
        OneRunAudit(canaries(3)).report(torch.zeros(2), claimed=1.0, delta=1e-5)
    single = OneRunAudit(canaries(1)).report(torch.zeros(1), claimed=1.0, delta=1e-5)
    assert single.lower_bound == 0
