"""Fail unless the phantom run's last validation is as good as the README says: `check_phantom.py LOG_FOLDER`."""

import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

AT_LEAST = {"val/zero_shot_top1": 0.75, "attribution/pointing_game": 0.65, "attribution_no_prior/pointing_game": 0.50}
CONTROLS = ("attribution_center/pointing_game", "attribution_prior_only/pointing_game")


def main() -> None:
    """Print the scores and compare."""
    events = EventAccumulator(sys.argv[1]).Reload()
    scores = {name: events.Scalars(name)[-1].value for name in (*AT_LEAST, *CONTROLS)}
    for name, value in scores.items():
        print(f"{name:40s} {value:.3f}" + (f"  (at least {AT_LEAST[name]})" if name in AT_LEAST else ""))
    short = [name for name, least in AT_LEAST.items() if scores[name] < least]
    if short:
        sys.exit(f"below what the README says: {', '.join(short)}")


if __name__ == "__main__":
    main()
