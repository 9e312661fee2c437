# ./dist_detection.sh configs/detection/maskrcnn_convmlp_l_fpn_1x_coco.py 8 /path/to/COCO
# Published: box AP 41.7 (AP50 62.8, AP75 45.5), mask AP 38.2 (59.9, 41.1); 62.2 M parameters
_base_ = "maskrcnn_convmlp_s_fpn_1x_coco.py"

model = dict(backbone=dict(arch="convmlp_l"), neck=dict(in_channels=[96, 192, 384, 768]))
