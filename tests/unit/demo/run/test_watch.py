"""Token counts read out of the collector's /metrics text."""

from __future__ import annotations

from latentwatch.demo.run.watch import read_collector, read_engine, series

COLLECTOR = """\
# HELP latentwatch_tokens_total Tokens.
# TYPE latentwatch_tokens_total counter
latentwatch_tokens_total{model_name="m",engine="0",state="scored",reason="none",phase="prompt"} 90.0
latentwatch_tokens_total{model_name="m",engine="0",state="scored",reason="none",phase="output"} 10
latentwatch_tokens_total{model_name="m",engine="1",state="inherited",reason="none",phase="prompt"} 7
latentwatch_tokens_total{model_name="m",engine="0",state="unseen",reason="prefix_cache",phase="prompt"} 2
latentwatch_tokens_total{model_name="m",engine="0",state="dropped",reason="lost",phase="prompt"} 1
latentwatch_tokens_total_of_another_name{state="scored",reason="none"} 1000
latentwatch_feature_fired_tokens_total{model_name="m",feature="sae.1"} 4
latentwatch_exceedances_total{model_name="m",feature="p.1",severity="critical"} 2
latentwatch_exceedances_total{model_name="m",feature="p.2",severity="warning"} 3
"""
ENGINE = """\
vllm:prompt_tokens_total{engine="0",model_name="m"} 600.0
vllm:prompt_tokens_created{engine="0",model_name="m"} 1.7e9
vllm:generation_tokens_total{engine="0",model_name="m"} 400.0
vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 12.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="m"} 8.0
vllm:request_success_total{engine="0",finished_reason="abort",model_name="m"} 0.0
"""


def test_the_collectors_page_is_summed_over_engines_and_phases() -> None:
    sample = read_collector(COLLECTOR, at=5.0)
    assert sample.at == 5.0
    assert sample.states == {"scored": 100, "inherited": 7, "unseen": 2, "dropped": 1}
    assert sample.reasons == {("unseen", "prefix_cache"): 2, ("dropped", "lost"): 1}
    assert sample.tokens == 110
    assert sample.fired == {"sae.1": 4}
    assert (sample.exceedances, sample.critical) == (5, 2)


def test_the_last_token_of_each_finished_request_was_never_fed() -> None:
    engine = read_engine(ENGINE)
    assert (engine.prompt, engine.output, engine.finished) == (600, 400, 20)
    assert engine.fed == 980


def test_an_empty_page_counts_nothing() -> None:
    assert read_engine("").fed == 0
    assert read_collector("", at=0.0).tokens == 0


def test_label_values_are_unescaped() -> None:
    text = r'thing_total{label="a \"quoted\" \\ and\nbroken, {x=\"1\"}",b="2"} 3'
    assert list(series(text, "thing_total")) == [
        ("thing_total", {"label": 'a "quoted" \\ and\nbroken, {x="1"}', "b": "2"}, 3.0)
    ]
