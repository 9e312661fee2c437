# ./dist_segmentation.sh configs/segmentation/fpn_convmlp_l_512x512_40k_ade20k.py 8 /path/to/ADE20k
# Published: mIoU 40.0; 46.3 M parameters
_base_ = "fpn_convmlp_s_512x512_40k_ade20k.py"

model = dict(backbone=dict(arch="convmlp_l"), neck=dict(in_channels=[96, 192, 384, 768]))
