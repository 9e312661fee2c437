# ./dist_segmentation.sh configs/segmentation/fpn_convmlp_s_512x512_40k_ade20k.py 8 /path/to/ADE20k
# Published: mIoU 35.8; 12.8 M parameters
_base_ = ["_base_/semantic_fpn.py", "_base_/ade20k.py", "_base_/schedule_40k.py", "_base_/runtime.py"]
