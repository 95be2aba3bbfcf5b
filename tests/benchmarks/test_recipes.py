from benchmarks.recipes import mean_and_spread, table


def test_mean_and_spread_by_hand():
    assert mean_and_spread([1.0, 2.0, 3.0], 1) == "2.0 ± 1.0"
    assert mean_and_spread([2.5], 2) == "2.50"
    assert mean_and_spread([], 2) == ""


def test_table_pools_seeds_by_model_and_method():
    def run(accuracy, threshold):
        return {
            "headline/nfe_ratio": 4.0,
            "teacher/one_token_per_step/accuracy": 0.99,
            "student/x/entropy/accuracy": accuracy,
            "student/x/entropy/nfe": 6.0,
            "student/x/entropy/threshold": threshold,
        }

    lines = table([run(0.98, 0.5), run(1.0, 0.35)]).splitlines()
    assert lines[0].startswith("| model | method | threshold | solution % |")
    assert lines[2].startswith("| teacher | one_token_per_step |  | 99.0 ± 0.0 |")
    assert lines[3].startswith("| x | entropy | 0.5, 0.35 | 99.0 ± 1.4 |  | 6.00 ± 0.00 |")
    assert len(lines) == 4
