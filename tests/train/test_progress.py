"""Long work without a bar says now and then how far it is."""

from memory3.train import progress


def test_time_left_is_said_now_and_then(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    said: list[str] = []
    done = progress.left(said.append, "memories", 300)
    for count in range(10, 101, 10):  # ten in six seconds
        now[0] += 6
        done(count)
    assert said == ["60 of 300 memories, 0:02:24 left"]
