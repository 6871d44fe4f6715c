"""What a bag, a dataset or a URDF shows of a robot: proposes a robot file, and says where one does not fit."""

from ki_vla_ros.survey.bag import BagSurvey, survey, survey_bag
from ki_vla_ros.survey.dataset import DatasetSurvey, survey_dataset
from ki_vla_ros.survey.misfits import BEYOND, Misfit, RobotFile, check_bag, check_bundle, check_dataset, check_urdf
from ki_vla_ros.survey.proposal import Proposal, read_description
from ki_vla_ros.survey.tracks import FASTEST

__all__ = [
    "BEYOND",
    "FASTEST",
    "BagSurvey",
    "DatasetSurvey",
    "Misfit",
    "Proposal",
    "RobotFile",
    "check_bag",
    "check_bundle",
    "check_dataset",
    "check_urdf",
    "read_description",
    "survey",
    "survey_bag",
    "survey_dataset",
]
