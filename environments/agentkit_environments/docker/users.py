"""Users of a container, by the files of its image."""

from __future__ import annotations


def resolve_user(user: str, passwd: str, group: str) -> list[str]:
    """Return the uid, the gid and the further gids of a user, as texts; as `docker exec --user` finds them.

    Args:
        user: `name` or `uid`, optionally with `:group` or `:gid`.
        passwd: The text of /etc/passwd.
        group: The text of /etc/group.

    Raises:
        ValueError: If there is no such user or group, and it is not a number.
    """
    wanted, has_group, wanted_group = user.partition(":")
    name, uid, gid = wanted, wanted, "0"
    users = [fields for line in passwd.splitlines() if len(fields := line.split(":")) >= 4]
    for fields in sorted(users, key=lambda fields: fields[0] != wanted):  # a name comes before a uid
        if wanted in (fields[0], fields[2]):
            name, uid, gid = fields[0], fields[2], fields[3]
            break
    groups = [fields for line in group.splitlines() if len(fields := line.split(":")) >= 4]
    if has_group:
        gid = next((fields[2] for fields in groups if wanted_group in (fields[0], fields[2])), wanted_group)
        further = []
    else:
        further = [fields[2] for fields in groups if name in fields[3].split(",")]
    for what, number in (("user", uid), ("group", gid)):
        if not (number.isascii() and number.isdecimal() and int(number) < 1 << 31):
            raise ValueError(f"the image has no {what} {number!r}, asked for by user={user!r}")
    return [uid, gid, *(number for number in further if number.isdecimal())]


def home_of(uid: str, passwd: str) -> str:
    """Return the home of a user by the text of /etc/passwd; `/` if it has none."""
    users = [fields for line in passwd.splitlines() if len(fields := line.split(":")) >= 6]
    return next((fields[5] for fields in users if fields[2] == uid and fields[5]), "/")
