"""A stand-in for SLURM's commands: small shell scripts that keep a queue in a file. Nothing in it ever runs."""

from __future__ import annotations

from pathlib import Path

SBATCH = r"""#!/bin/sh
cd "$(dirname "$0")"
script=$2; env > environment
if [ -e refuse ] && [ "$(cat next)" -ge "$(cat refuse)" ]; then
    echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2
    echo "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy" >&2; exit 1
fi
id=$(cat next); echo $((id + 1)) > next; cp "$script" "$id.sh"
comment= last= reason=Priority
while read -r word option rest; do
    case $option in
        --comment=*) comment=${option#*=};;
        --array=0-*) last=${option#*-*-*-}; last=${last%%\%*};;
        --dependency=*) reason=Dependency;;
    esac
done < "$script"
if [ -z "$last" ]; then echo "$id|PENDING||$comment|$reason" >> queue
else i=0; while [ $i -le "$last" ]; do echo "${id}_$i|PENDING||$comment|$reason"; i=$((i + 1)); done >> queue; fi
echo "$id;cluster"
"""
SQUEUE = """#!/bin/sh
cd "$(dirname "$0")"
case "$*" in *OUT_OF_MEMORY*) [ ! -e out_of_memory ] || cat out_of_memory; exit;; esac
[ -e down ] && { echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1; }
cat queue
"""
SCANCEL = """#!/bin/sh
cd "$(dirname "$0")"
for id in "$@"; do grep -v "^$id|" queue > rest; mv rest queue; done
"""
SCONTROL = """#!/bin/sh
cd "$(dirname "$0")"
echo "$@" >> scontrol.log
echo "MaxArraySize            = 11"; echo "MaxJobCount             = 10000"; echo "ClusterName = fake"
[ ! -e associations ] || echo "AccountingStorageEnforce = $(cat enforced 2>/dev/null || echo associations,limits,qos)"
"""
# rows as sacctmgr 22.05 with slurmdbd printed them
SACCTMGR = """#!/bin/sh
cd "$(dirname "$0")"
case "$*" in *"show user"*) cat associations;; *"show qos $(cut -d" " -f1 qos) "*) cut -d" " -f2 qos;; esac
"""

SINFO = """#!/bin/sh
cd "$(dirname "$0")"
cat partitions
"""


class FakeSlurm:
    """The commands in a folder, and its queue as the test sets it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scancel", SCANCEL), ("scontrol", SCONTROL), ("sinfo", SINFO), ("sacctmgr", SACCTMGR)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        (folder / "next").write_text("100\n")
        (folder / "queue").write_text("")
        (folder / "partitions").write_text("low*|2|1-infinite\n")

    @property
    def scripts(self) -> dict[str, str]:
        """Job id -> the script that sbatch was given."""
        return {p.stem: p.read_text() for p in sorted(self.folder.glob("*.sh"))}

    @property
    def queue(self) -> list[list[str]]:
        """Lines of the queue: id, state, node, comment, reason."""
        return [line.split("|") for line in (self.folder / "queue").read_text().splitlines()]

    @queue.setter
    def queue(self, lines: list[list[str]]) -> None:
        (self.folder / "queue").write_text("".join("|".join(line) + "\n" for line in lines))

    def set(self, id: str, state: str, host: str = "", reason: str = "None") -> None:
        """Change a job's line."""
        self.queue = [[i, state, host, c, reason] if i == id else [i, s, h, c, r] for i, s, h, c, r in self.queue]

    def options(self, id: str) -> dict[str, str]:
        """The #SBATCH options of a script."""
        pairs = [line.removeprefix("#SBATCH --").partition("=") for line in self.scripts[id].splitlines() if line.startswith("#SBATCH --")]
        return {name: value for name, _, value in pairs}
