# ./dist_segmentation.sh configs/segmentation/fpn_convmlp_m_512x512_40k_ade20k.py 8 /path/to/ADE20k
# Published: mIoU 38.6; 21.1 M parameters
_base_ = "fpn_convmlp_s_512x512_40k_ade20k.py"

model = dict(backbone=dict(arch="convmlp_m"))
