"""A command whose repeatable options take several values at once."""

from __future__ import annotations

import click


class SpreadCommand(click.Command):
    """Takes `--seeds 0 1 2` for `--seeds 0 --seeds 1 --seeds 2`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the name of a repeatable option before each of its values."""
        repeatable = {
            name
            for option in self.params
            if isinstance(option, click.Option) and option.multiple
            for name in option.opts
        }
        spread: list[str] = []
        current, first = None, False
        for word in args:
            if word.startswith("-"):
                current, first = (word if word in repeatable else None), True
            elif current and not first:
                spread.append(current)
            else:
                first = False
            spread.append(word)
        return super().parse_args(ctx, spread)
