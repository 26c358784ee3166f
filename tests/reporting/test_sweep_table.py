from sft_lightning.reporting.sweep import Evaluation, Rate, SizeResult, read_results
from sft_lightning.reporting.sweep_table import report, size_table, step_table


def test_the_table_of_sizes(sweep):
    # Wilson's intervals of 0, 2, 4, 8 and 10 of 10.
    assert size_table(read_results(sweep, {"100": 100, "full": 400})).splitlines() == [
        "|   size | examples | steps | val loss |      format accuracy |      answer accuracy | p vs smaller |",
        "| -----: | -------: | ----: | -------: | -------------------: | -------------------: | -----------: |",
        "| before |        0 |     0 |          | 0.200 [0.057, 0.510] | 0.000 [0.000, 0.278] |              |",
        "|    100 |      100 |    12 |    2.250 | 0.800 [0.490, 0.943] | 0.400 [0.168, 0.687] |              |",
        "|   full |      400 |    50 |          | 1.000 [0.722, 1.000] | 1.000 [0.722, 1.000] |        0.031 |",
    ]


def test_the_table_over_training(sweep):
    lines = step_table(read_results(sweep, {"100": 100, "full": 400})).splitlines()
    assert [line.split("|")[1:3] for line in lines[2:]] == [
        ["  100 ", "    0 "],
        ["  100 ", "    1 "],
        ["  100 ", "   12 "],
        [" full ", "    0 "],
        [" full ", "   50 "],
    ]
    assert lines[3].endswith("| 1.000 [0.722, 1.000] | 0.300 [0.108, 0.603] |")


def test_a_small_p_value_is_not_zero():
    rate = Rate(0.5, 0.4, 0.6)
    result = SizeResult("8", 8, "size-8", 1, None, (Evaluation(1, 100, rate, rate),), p_value=1e-9)
    lines = size_table([result]).splitlines()
    assert len(lines) == 3
    assert lines[2].endswith("|      < 0.001 |")


def test_the_report_holds_both_tables_and_the_picture(sweep):
    results = read_results(sweep, {"100": 100, "full": 400})
    text = report(results)
    assert size_table(results) in text
    assert step_table(results) in text
    assert "(sweep.png)" in text
    assert "10 prompts" in text
