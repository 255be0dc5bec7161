"""What torchrun tells the processes that it starts; light, for those that tests start."""

import socket


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def as_rank(rank: int, world: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets for one of so many processes of a machine."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world))
    return common | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
