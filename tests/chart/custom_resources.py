"""The shapes of what is no part of Kubernetes, as far as the chart uses it, from each project's reference:

KEDA 2 (ScaledObject, TriggerAuthentication, PostgreSQL scaler), the Prometheus operator (monitoring.coreos.com/v1) and
the Gateway API (gateway.networking.k8s.io/v1).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]
Duration = Annotated[str, StringConstraints(pattern=r"^([0-9]+(ms|s|m|h))+$")]
Labels = dict[str, str]


class Shape(BaseModel):
    """Nothing more than is said, in no other type."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Shape):
    name: Name
    labels: Labels
    annotations: Labels | None = None


class Target(Shape):
    name: Name


class Policy(Shape):
    type: Literal["Pods", "Percent"]
    value: int = Field(gt=0)
    periodSeconds: int = Field(gt=0, le=1800)


class ScaleDown(Shape):
    stabilizationWindowSeconds: int = Field(ge=0, le=3600)
    policies: list[Policy]


class Behavior(Shape):
    scaleDown: ScaleDown


class AutoscalerConfig(Shape):
    behavior: Behavior


class Advanced(Shape):
    horizontalPodAutoscalerConfig: AutoscalerConfig


class PostgresqlQuery(Shape):
    # KEDA's metadata are strings, numbers too.
    query: str
    targetQueryValue: str
    activationTargetQueryValue: str


class PostgresqlTrigger(Shape):
    type: Literal["postgresql"]
    metadata: PostgresqlQuery
    authenticationRef: Target


class ScaledObjectSpec(Shape):
    scaleTargetRef: Target
    minReplicaCount: int = Field(ge=0)
    maxReplicaCount: int = Field(gt=0)
    pollingInterval: int = Field(gt=0)
    cooldownPeriod: int = Field(ge=0)
    advanced: Advanced
    triggers: list[PostgresqlTrigger] = Field(min_length=1)


class ScaledObject(Shape):
    apiVersion: Literal["keda.sh/v1alpha1"]
    kind: Literal["ScaledObject"]
    metadata: Metadata
    spec: ScaledObjectSpec


class SecretTarget(Shape):
    parameter: Literal["connection"]
    name: Name
    key: str


class TriggerAuthenticationSpec(Shape):
    secretTargetRef: list[SecretTarget] = Field(min_length=1)


class TriggerAuthentication(Shape):
    apiVersion: Literal["keda.sh/v1alpha1"]
    kind: Literal["TriggerAuthentication"]
    metadata: Metadata
    spec: TriggerAuthenticationSpec


class Selector(Shape):
    matchLabels: Labels


class Endpoint(Shape):
    port: Annotated[str, StringConstraints(max_length=15)]
    path: Literal["/metrics"]
    interval: Duration


class ServiceMonitorSpec(Shape):
    selector: Selector
    endpoints: list[Endpoint] = Field(min_length=1)


class ServiceMonitor(Shape):
    apiVersion: Literal["monitoring.coreos.com/v1"]
    kind: Literal["ServiceMonitor"]
    metadata: Metadata
    spec: ServiceMonitorSpec


class PodMonitorSpec(Shape):
    selector: Selector
    podTargetLabels: list[str]
    podMetricsEndpoints: list[Endpoint] = Field(min_length=1)


class PodMonitor(Shape):
    apiVersion: Literal["monitoring.coreos.com/v1"]
    kind: Literal["PodMonitor"]
    metadata: Metadata
    spec: PodMonitorSpec


class Annotations(Shape):
    summary: str
    description: str


class Severity(Shape):
    severity: Literal["warning", "critical"]


class Alert(Shape):
    alert: str
    expr: str
    for_: Duration | None = Field(default=None, alias="for")
    labels: Severity
    annotations: Annotations


class Group(Shape):
    name: str
    rules: list[Alert]


class PrometheusRuleSpec(Shape):
    groups: list[Group]


class PrometheusRule(Shape):
    apiVersion: Literal["monitoring.coreos.com/v1"]
    kind: Literal["PrometheusRule"]
    metadata: Metadata
    spec: PrometheusRuleSpec


class Parent(Shape):
    name: Name
    namespace: Name | None = None


class Backend(Shape):
    name: Name
    port: int = Field(gt=0, lt=65536)


class Timeouts(Shape):
    request: Duration


class RouteRule(Shape):
    timeouts: Timeouts
    backendRefs: list[Backend] = Field(min_length=1)


class HTTPRouteSpec(Shape):
    parentRefs: list[Parent] = Field(min_length=1)
    hostnames: list[Name] | None = None
    rules: list[RouteRule]


class HTTPRoute(Shape):
    apiVersion: Literal["gateway.networking.k8s.io/v1"]
    kind: Literal["HTTPRoute"]
    metadata: Metadata
    spec: HTTPRouteSpec


SHAPES: dict[str, type[Shape]] = {
    shape.__name__: shape
    for shape in (ScaledObject, TriggerAuthentication, ServiceMonitor, PodMonitor, PrometheusRule, HTTPRoute)
}
