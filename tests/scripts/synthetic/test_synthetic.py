from __future__ import annotations

import cmath
import csv
import json
import math
import re
import subprocess
import sys
import wave
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from scripts.synthetic import dataset, voice
from scripts.synthetic.__main__ import main

ROOT = Path(__file__).resolve().parents[3]

N_MELS = 40
FLOOR = math.log(1e-9)


SMALL = {
    "--speakers": 4,
    "--utterances": 5,
    "--test-utterances": 6,
    "--frames-min": 60,
    "--frames-max": 120,
    "--seed": 3,
}


def flags(options: dict[str, int]) -> list[str]:
    return [str(part) for option in options.items() for part in option]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def load(path: Path) -> torch.Tensor:
    mel = torch.load(path, weights_only=True)
    assert isinstance(mel, torch.Tensor)
    return mel


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("small") / "out"
    result = run(out, "--workers", 1, *flags(SMALL))
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def mels() -> dict[int, list[np.ndarray]]:
    """Ten utterances of each of eight speakers, by speaker."""
    plan = dataset.plan_dataset(8, [250] * 80, 0, 0)
    by_speaker = defaultdict(list)
    for utterance in plan.train:
        by_speaker[utterance.speaker].append(dataset.render(utterance, 0).numpy())
    return by_speaker


def test_layout_is_the_homeworks(small: Path) -> None:
    dataset = small / "Dataset"
    metadata = json.loads((dataset / "metadata.json").read_text())
    mapping = json.loads((dataset / "mapping.json").read_text())
    testdata = json.loads((dataset / "testdata.json").read_text())
    names = ["id00000", "id00001", "id00002", "id00003"]

    assert metadata["n_mels"] == testdata["n_mels"] == N_MELS
    assert [len(metadata["speakers"][name]) for name in names] == [5, 5, 5, 5]
    assert mapping["speaker2id"] == {name: n for n, name in enumerate(names)}
    assert mapping["id2speaker"] == {str(n): name for n, name in enumerate(names)}
    entries = [entry for entries in metadata["speakers"].values() for entry in entries]
    entries += testdata["utterances"]
    assert len(entries) == 26
    for entry in entries:
        mel = load(dataset / entry["feature_path"])
        assert re.fullmatch(r"uttr-[0-9a-f]{32}\.pt", entry["feature_path"])
        assert mel.dtype == torch.float32
        assert mel.shape == (entry["mel_len"], N_MELS)
        assert 60 <= entry["mel_len"] <= 120
    files = {entry["feature_path"] for entry in entries}
    assert len(files) == 26
    assert {path.name for path in dataset.iterdir()} == files | {
        "metadata.json",
        "mapping.json",
        "testdata.json",
    }


def test_labels_are_those_of_the_test_utterances_in_their_order(small: Path) -> None:
    testdata = json.loads((small / "Dataset" / "testdata.json").read_text())
    with (small / "test_labels.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["Id", "Category"]
    assert [row[0] for row in rows[1:]] == [u["feature_path"] for u in testdata["utterances"]]
    assert {row[1] for row in rows[1:]} == {"id00000", "id00001", "id00002", "id00003"}


def test_readme_says_that_it_is_not_speech(small: Path) -> None:
    text = (small / "README.txt").read_text()
    assert "not speech" in text
    assert "no person was recorded" in text


def test_bytes_do_not_depend_on_the_number_of_workers(small: Path, tmp_path: Path) -> None:
    # In a process of its own, as a user starts it: its two workers import the script again.
    out = tmp_path / "out"
    command = [sys.executable, "-m", "scripts.synthetic", str(out), "--workers", "2"]
    subprocess.run([*command, *flags(SMALL)], cwd=ROOT, check=True, capture_output=True)
    assert contents(out) == contents(small)


def test_recordings_are_the_waveforms_behind_the_mels(tmp_path: Path) -> None:
    plan = dataset.plan_dataset(2, [60, 80, 70], test=1, seed=3)
    dataset.write_recordings(tmp_path, plan, workers=1)
    files = sorted(tmp_path.glob("recordings/*/*/*.wav"))
    assert len(files) == 3
    for utterance in (*plan.train, *plan.test):
        place = f"recordings/id{utterance.speaker:05d}/session{utterance.session:02d}"
        with wave.open(str(tmp_path / place / f"{utterance.number:05d}.wav")) as file:
            assert (file.getframerate(), file.getnchannels()) == (voice.SAMPLE_RATE, 1)
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
        # 16 bits are too few for the lowest values.
        found = dataset.log_mel(torch.from_numpy(samples / np.float32(32768))).clamp(min=-12)
        torch.testing.assert_close(
            found, dataset.render(utterance, 3).clamp(min=-12), atol=0.2, rtol=0
        )
    assert "no person was recorded" in (tmp_path / "README.txt").read_text()


def test_another_seed_gives_other_names_and_other_mels() -> None:
    ours, theirs = (dataset.plan_dataset(2, [50] * 4, 0, seed) for seed in (0, 1))
    assert not {u.name for u in ours.train} & {u.name for u in theirs.train}
    first, second = (dataset.render(p.train[0], p.seed) for p in (ours, theirs))
    assert not torch.equal(first, second)


def test_each_line_of_a_lengths_file_gives_an_utterance_and_the_last_are_for_testing(
    tmp_path: Path,
) -> None:
    lengths = [8, 33, 21, 9, 40, 17, 12]
    (tmp_path / "lengths.txt").write_text("".join(f"{n}\n" for n in lengths))
    out = tmp_path / "out"
    arguments = ["--speakers", 2, "--test-utterances", 3, "--workers", 1]
    result = run(out, "--lengths", tmp_path / "lengths.txt", *arguments)
    assert result.exit_code == 0, result.output

    speakers = json.loads((out / "Dataset" / "metadata.json").read_text())["speakers"]
    tests = json.loads((out / "Dataset" / "testdata.json").read_text())["utterances"]
    assert {s: [u["mel_len"] for u in us] for s, us in speakers.items()} == {
        "id00000": [8, 21],
        "id00001": [33, 9],
    }
    assert [u["mel_len"] for u in tests] == [40, 17, 12]
    for utterance in [u for us in speakers.values() for u in us] + tests:
        mel = load(out / "Dataset" / utterance["feature_path"])
        assert mel.shape == (utterance["mel_len"], N_MELS)


@pytest.mark.parametrize("line", ["12.5", "-4", "7", "many"])
def test_broken_lengths_are_refused_with_their_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "lengths.txt").write_text(f"100\n{line}\n")
    result = run(tmp_path / "out", "--lengths", tmp_path / "lengths.txt")
    assert result.exit_code == 2
    assert "line 2" in result.output
    assert repr(line) in result.output
    assert not (tmp_path / "out").exists()


def test_too_few_lengths_for_the_speakers_are_refused(tmp_path: Path) -> None:
    (tmp_path / "lengths.txt").write_text("100\n" * 6)
    arguments = ["--speakers", 4, "--test-utterances", 3]
    result = run(tmp_path / "out", "--lengths", tmp_path / "lengths.txt", *arguments)
    assert result.exit_code == 2
    assert "lower --speakers or --test-utterances" in " ".join(result.output.split())


def test_a_folder_with_files_is_refused_and_not_changed(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    result = run(tmp_path, "--workers", 1)
    assert result.exit_code == 2
    assert f"{tmp_path} is not empty" in " ".join(result.output.split())
    assert contents(tmp_path) == {"mine.txt": b"mine"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--frames-min", "200", "--frames-max", "100"], "--frames-min 200 exceeds"),
        (["--frames-min", "3"], "--frames-min"),
    ],
)
def test_contradictions_are_usage_errors(tmp_path: Path, arguments: list[str], words: str) -> None:
    result = run(tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert words in result.output


def test_an_interrupted_run_has_no_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = dataset.render
    plan = dataset.plan_dataset(2, [20] * 8, 2, 0)

    def fail_at_the_last(utterance: object, seed: int) -> torch.Tensor:
        if utterance == plan.test[-1]:
            raise KeyboardInterrupt
        mel = real(utterance, seed)
        assert isinstance(mel, torch.Tensor)
        return mel

    monkeypatch.setattr(dataset, "render", fail_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        dataset.write_dataset(tmp_path / "out", plan, workers=1)
    left = {path.suffix for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert left == {".pt"}


def test_sessions_of_test_and_train_are_disjoint_and_shares_are_equal() -> None:
    plan = dataset.plan_dataset(7, [100] * 500, 150, 5)
    sessions = {s: {(u.speaker, u.session) for u in getattr(plan, s)} for s in ("train", "test")}
    assert not sessions["train"] & sessions["test"]
    for split, count in (("train", 350), ("test", 150)):
        shares = np.bincount([u.speaker for u in getattr(plan, split)], minlength=7)
        assert shares.sum() == count
        assert shares.max() - shares.min() <= 1
    per_speaker = [len({s for n, s in sessions["train"] if n == speaker}) for speaker in range(7)]
    assert min(per_speaker) > 3
    # The order of the test utterances must not reveal their speakers.
    assert [u.speaker for u in plan.test[:7]] != [u.speaker for u in plan.test[7:14]]


def test_drawn_lengths_keep_their_bounds_and_spread() -> None:
    lengths = np.array(dataset.draw_lengths(2000, 150, 600, 0))
    assert lengths.min() >= 150
    assert lengths.max() <= 600
    assert 280 < np.median(lengths) < 320


def test_filterbank_is_the_htk_formula() -> None:
    def mel(hertz: float) -> float:
        return 2595.0 * math.log10(1.0 + hertz / 700.0)

    edges = [
        700.0 * (10.0 ** ((mel(50.0) + (mel(8000.0) - mel(50.0)) * n / 41) / 2595.0) - 1.0)
        for n in range(42)
    ]
    expected = np.zeros((201, N_MELS))
    for k in range(201):
        hertz = k * 16000.0 / 400
        for n in range(N_MELS):
            left, centre, right = edges[n : n + 3]
            if left < hertz <= centre:
                expected[k, n] = (hertz - left) / (centre - left)
            elif centre < hertz < right:
                expected[k, n] = (right - hertz) / (right - centre)
    np.testing.assert_allclose(dataset.mel_filterbank().numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("samples", [400, 479])
def test_log_mel_is_a_naive_transform_of_reflected_frames(samples: int) -> None:
    rng = np.random.default_rng(0)
    wave = rng.normal(0.0, 0.2, samples)
    scaled = wave * 10.0 ** (-3.0 / 20.0) / np.abs(wave).max()
    frames = samples // 160 + 1
    window = [0.5 - 0.5 * math.cos(2.0 * math.pi * n / 400) for n in range(400)]
    bank = dataset.mel_filterbank().double().numpy()
    expected = np.zeros((frames, N_MELS))
    for t in range(frames):
        places = [abs(t * 160 + n - 200) for n in range(400)]
        places = [p if p < samples else 2 * (samples - 1) - p for p in places]
        frame = [window[n] * scaled[p] for n, p in enumerate(places)]
        power = [
            abs(sum(x * cmath.exp(-2j * math.pi * k * n / 400) for n, x in enumerate(frame))) ** 2
            for k in range(201)
        ]
        expected[t] = np.log(np.maximum(np.array(power) @ bank, 1e-9))
    got = dataset.log_mel(torch.from_numpy(wave.astype(np.float32)))
    assert got.shape == (frames, N_MELS)
    np.testing.assert_allclose(got.numpy(), expected, atol=2e-3)


def test_silence_has_the_lowest_value() -> None:
    click = torch.zeros(16000)
    click[8000] = 0.5
    mel = dataset.log_mel(click)
    assert mel[0].numpy() == pytest.approx(FLOOR)


@pytest.mark.slow
def test_mels_have_the_range_and_the_smoothness_of_speech(
    mels: dict[int, list[np.ndarray]],
) -> None:
    everything = np.concatenate([m for group in mels.values() for m in group])
    assert np.isfinite(everything).all()
    assert everything.min() >= FLOOR
    assert everything.max() < 10.0
    assert -2.5 < everything.mean() < 0.5
    assert 1.8 < everything.std() < 3.5
    for mel in (m for group in mels.values() for m in group):
        moving = mel - mel.mean(0)
        neighbours = (moving[1:] * moving[:-1]).mean() / np.square(moving).mean()
        distant = (moving[40:] * moving[:-40]).mean() / np.square(moving).mean()
        assert neighbours > 0.7
        assert distant < 0.4


def test_pitch_shows_as_harmonics() -> None:
    pulses = voice._pulses(np.full(100, 200.0), 16000).astype(np.float64)
    spectrum = np.abs(np.fft.rfft(pulses)) ** 2
    assert np.square(pulses).mean() == pytest.approx(1.0, rel=0.02)
    # Bins are 1 Hz apart: all the power below 2 kHz sits on multiples of 200 Hz.
    assert spectrum[200:2000:200].sum() > 0.99 * spectrum[100:1900].sum()


def test_resonances_peak_at_the_formants() -> None:
    speaker = voice.draw_speaker(np.random.default_rng(0))
    vowel = voice._NAMES.index("i")
    envelope = voice._resonances(speaker, np.full(20, vowel))[10].numpy()
    peaks = np.flatnonzero((envelope[1:-1] > envelope[:-2]) & (envelope[1:-1] > envelope[2:])) + 1
    hertz = peaks * 8000.0 / 240
    for formant in speaker.formants[vowel, :2]:
        assert np.abs(hertz - formant).min() < 60.0


def ratio_of_distances(features: dict[int, list[np.ndarray]]) -> float:
    """Mean distance between different speakers over mean distance within one."""
    pairs = [
        (a == b, float(np.linalg.norm(x - y)))
        for a, xs in features.items()
        for b, ys in features.items()
        for i, x in enumerate(xs)
        for j, y in enumerate(ys)
        if (a, i) < (b, j)
    ]
    same = [distance for is_same, distance in pairs if is_same]
    different = [distance for is_same, distance in pairs if not is_same]
    return float(np.mean(different) / np.mean(same))


def test_speakers_differ_more_than_utterances_of_one_speaker(
    mels: dict[int, list[np.ndarray]],
) -> None:
    # How rough each part of the spectrum is, from frame to frame. It shows harmonics and formants;
    # subtracting the utterance's mean removes the microphone.
    def roughness(mel: np.ndarray) -> np.ndarray:
        return np.log(np.diff(mel - mel.mean(0), 2, axis=1).std(0))

    features = {speaker: [roughness(mel) for mel in group] for speaker, group in mels.items()}
    everyone = [feature for group in features.values() for feature in group]
    shuffled = {n: everyone[n :: len(features)] for n in features}
    assert ratio_of_distances(features) > 1.3
    assert ratio_of_distances(shuffled) < 1.1
