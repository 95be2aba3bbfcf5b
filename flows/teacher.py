from flows.environment import flow

from dparallel.config.teacher import TeacherConfig
from flows.command import main
from flows.names import flow_run_name
from tasks.checks import TeacherSettings, all_overrides, checked_teacher
from tasks.teacher import train_teacher


def plan(config: str, overrides: list[str] | None = None) -> TeacherConfig:
    """Check the parameters and load the settings."""
    return checked_teacher(config, overrides)


@flow("teacher", flow_run_name)
def teacher(config: str, overrides: list[str] | None = None, settings: TeacherSettings | None = None) -> str:
    """Train the tiny teacher from scratch.

    Args:
        config: a YAML file, see configs/tiny_teacher.yaml.
        overrides: settings `key.sub=value` that override the file and `settings`.
        settings: settings that override the file, as values.
    """
    given = all_overrides(settings, overrides)
    return run(plan(config, given), config, given)


def run(planned: TeacherConfig, config: str, overrides: list[str] | None = None, **parameters: object) -> str:
    """Train the teacher; returns its folder."""
    return train_teacher(planned, config, overrides or [])


if __name__ == "__main__":
    main(teacher, plan, run)
