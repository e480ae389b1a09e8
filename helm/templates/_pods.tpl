{{/* What the pods are made of. */}}

{{- define "latentwatch.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: {{ .Values.runAsUser }}
runAsGroup: {{ .Values.runAsUser }}
fsGroup: {{ .Values.runAsUser }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* Complete by itself: in a patched pod there is no pod security context of ours. */}}
{{- define "latentwatch.containerSecurityContext" -}}
runAsNonRoot: true
runAsUser: {{ .Values.runAsUser }}
runAsGroup: {{ .Values.runAsUser }}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* Args: "watchlist" or "baseline"; its value. Where the file is in a container. */}}
{{- define "latentwatch.artifactPath" -}}
{{- $source := index . 1 -}}
/etc/latentwatch/{{ index . 0 }}/{{ with $source.configMap }}{{ .key }}{{ end }}{{ with $source.persistentVolumeClaim }}{{ .path }}{{ end }}{{ with $source.image }}{{ .path }}{{ end }}
{{- end -}}

{{/* Args: as above. */}}
{{- define "latentwatch.artifactMount" -}}
- name: latentwatch-{{ index . 0 }}
  mountPath: /etc/latentwatch/{{ index . 0 }}
  readOnly: true
{{- end -}}

{{/* Args: as above. */}}
{{- define "latentwatch.artifactVolume" -}}
- name: latentwatch-{{ index . 0 }}
{{- with (index . 1).configMap }}
  configMap:
    name: {{ .name }}
    items:
      - key: {{ .key }}
        path: {{ .key }}
{{- end }}
{{- with (index . 1).persistentVolumeClaim }}
  persistentVolumeClaim:
    claimName: {{ .claimName }}
    readOnly: true
{{- end }}
{{- with (index . 1).image }}
  image:
    reference: {{ .reference | quote }}
    pullPolicy: {{ default "IfNotPresent" .pullPolicy }}
{{- end }}
{{- end -}}

{{/* Args: name of the volume; name and key of the Secret. Readable by every user: it belongs to root, a patched pod may
     have no group of ours, and only the collector's container mounts it. */}}
{{- define "latentwatch.secretVolume" -}}
- name: {{ index . 0 }}
  secret:
    secretName: {{ (index . 1).name }}
    defaultMode: 0444
    items:
      - key: {{ (index . 1).key }}
        path: {{ (index . 1).key }}
{{- end -}}

{{/* Options of `latentwatch collector`, as a list. */}}
{{- define "latentwatch.collectorArgs" -}}
- --watchlist={{ include "latentwatch.artifactPath" (list "watchlist" .Values.watchlist) }}
{{- if eq .Values.mode "sidecar" }}
- --listen=unix:///run/latentwatch/collector.sock
{{- else }}
- --listen={{ .Values.collector.bindAddress }}:{{ .Values.collector.grpcPort }}
{{- end }}
{{- with .Values.baseline }}
- --baseline={{ include "latentwatch.artifactPath" (list "baseline" .) }}
{{- end }}
{{- with .Values.canaryKey }}
- --canary-key=/etc/latentwatch/canary/{{ .key }}
{{- end }}
- --state=/var/lib/latentwatch/state
- --http={{ .Values.collector.bindAddress }}:{{ .Values.collector.httpPort }}
{{- range .Values.collector.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end -}}

{{/* What the collector's container has in both modes, behind its name, command and probes. */}}
{{- define "latentwatch.collectorContainer" -}}
image: {{ include "latentwatch.image" (list .Values.image .Chart.AppVersion) | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- with .Values.collector.extraEnv }}
env:
  {{- toYaml . | nindent 2 }}
{{- end }}
resources:
  {{- toYaml .Values.collector.resources | nindent 2 }}
securityContext:
  {{- include "latentwatch.containerSecurityContext" . | nindent 2 }}
{{- end -}}

{{- define "latentwatch.collectorMounts" -}}
{{ include "latentwatch.artifactMount" (list "watchlist" .Values.watchlist) }}
{{- with .Values.baseline }}
{{ include "latentwatch.artifactMount" (list "baseline" .) }}
{{- end }}
{{- with .Values.canaryKey }}
- name: latentwatch-canary
  mountPath: /etc/latentwatch/canary
  readOnly: true
{{- end }}
- name: latentwatch-data
  mountPath: /var/lib/latentwatch
- name: latentwatch-tmp
  mountPath: /tmp
{{- with .Values.collector.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "latentwatch.collectorVolumes" -}}
{{ include "latentwatch.artifactVolume" (list "watchlist" .Values.watchlist) }}
{{- with .Values.baseline }}
{{ include "latentwatch.artifactVolume" (list "baseline" .) }}
{{- end }}
{{- with .Values.canaryKey }}
{{ include "latentwatch.secretVolume" (list "latentwatch-canary" .) }}
{{- end }}
- name: latentwatch-data
{{- with .Values.persistence }}
{{- if .enabled }}
  persistentVolumeClaim:
    claimName: {{ default (printf "%s-collector" (include "latentwatch.fullname" $)) .existingClaim }}
{{- else }}
  emptyDir: {}
{{- end }}
{{- end }}
- name: latentwatch-tmp
  emptyDir: {}
{{- with .Values.collector.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}
