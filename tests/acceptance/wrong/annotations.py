# ruff: noqa: ANN001, ANN201 - the mistakes are the point
# mypy: ignore-errors
# Wrong on purpose: a comment `# ! KIND Class.method` marks each line that a mistake is to be found at.
import chains_stream as chains


class Untyped(chains.ChainletBase):
    async def run_remote(
        self,
        first,  # ! MISSING_ANNOTATION Untyped.run_remote
        second: int,
        third=3,  # ! MISSING_ANNOTATION Untyped.run_remote
    ) -> str:
        return f"{first}{second}{third}"


class NoResult(chains.ChainletBase):
    async def run_remote(self, name: str):  # ! MISSING_ANNOTATION NoResult.run_remote
        return name


@chains.mark_entrypoint
class Both(chains.ChainletBase):
    def __init__(self, untyped=chains.depends(Untyped)) -> None:  # ! MISSING_ANNOTATION Both.__init__
        self._untyped = untyped

    async def run_remote(self, name):  # ! MISSING_ANNOTATION Both.run_remote; MISSING_ANNOTATION Both.run_remote
        return name
