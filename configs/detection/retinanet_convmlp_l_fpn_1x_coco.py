# ./dist_detection.sh configs/detection/retinanet_convmlp_l_fpn_1x_coco.py 8 /path/to/COCO
# Published: box AP 40.2 (AP50 59.3, AP75 43.3); 52.9 M parameters
_base_ = "retinanet_convmlp_s_fpn_1x_coco.py"

model = dict(backbone=dict(arch="convmlp_l"), neck=dict(in_channels=[96, 192, 384, 768]))
