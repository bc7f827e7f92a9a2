"""mmengine, mmcv, mmseg and mmdet, imported here and nowhere else."""
